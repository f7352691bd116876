{{/* Names, labels and images. */}}

{{- define "tickserve.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{/*
The name of every object, 50 characters at most, so that a suffix fits. A release called `tickserve` or `triton-tickserve`
gives `triton-tickserve`: see values.yaml for why no name may begin with `tickserve`.
*/}}
{{- define "tickserve.fullname" -}}
{{- $name := include "tickserve.name" . -}}
{{- $full := $name -}}
{{- if .Values.fullnameOverride -}}
{{- $full = .Values.fullnameOverride -}}
{{- else if contains $name .Release.Name -}}
{{- $full = .Release.Name -}}
{{- else if not (has .Release.Name (list "tickserve" "triton")) -}}
{{- $full = printf "%s-%s" $name .Release.Name -}}
{{- end -}}
{{- $full = $full | trunc 50 | trimSuffix "-" -}}
{{- if hasPrefix "tickserve" $full -}}
{{- fail (printf "fullnameOverride, nameOverride: expected a name that does not begin with \"tickserve\" (Kubernetes would set TICKSERVE_... in every pod of the namespace, and the tickserve command refuses those), was %q" $full) -}}
{{- end -}}
{{- $full -}}
{{- end -}}

{{/* What never changes in the life of a release: (list context component). */}}
{{- define "tickserve.selectorLabels" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ include "tickserve.name" $root }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{/* All labels of an object: (list context component). */}}
{{- define "tickserve.labels" -}}
{{- $root := index . 0 -}}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" }}
{{ include "tickserve.selectorLabels" . }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: tickserve
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
{{- end -}}

{{/* Labels of a pod: (list context component). Without the versions: a new chart alone is no reason to restart. */}}
{{- define "tickserve.podLabels" -}}
{{ include "tickserve.selectorLabels" . }}
app.kubernetes.io/part-of: tickserve
{{- with (index . 0).Values.podLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* registry/repository:tag@digest: (list context image). The registry of `image` unless the image names one. */}}
{{- define "tickserve.imageOf" -}}
{{- $image := index . 1 -}}
{{- $registry := default (index . 0).Values.image.registry $image.registry -}}
{{- $registry | empty | ternary "" (printf "%s/" $registry) -}}
{{- $image.repository -}}
{{- with $image.tag }}:{{ . }}{{ end -}}
{{- with $image.digest }}@{{ . }}{{ end -}}
{{- end -}}

{{- define "tickserve.image" -}}
{{- include "tickserve.imageOf" (list . .Values.image) -}}
{{- end -}}

{{- define "tickserve.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "tickserve.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "tickserve.restrictedSecret" -}}
{{- default (printf "%s-restricted" (include "tickserve.fullname" .)) .Values.server.restrictedSecret -}}
{{- end -}}
