{{/* What every pod of the chart has in common: the restricted profile of the Pod Security Standards, and less. */}}

{{/* (list context serviceAccountName) */}}
{{- define "tickserve.podSecurity" -}}
serviceAccountName: {{ include "tickserve.serviceAccountName" . }}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: 1000
  runAsGroup: 1000
  # So that mounted Secrets are readable to it, and to nobody else.
  fsGroup: 1000
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile:
    type: RuntimeDefault
{{- end -}}

{{- define "tickserve.containerSecurity" -}}
securityContext:
  allowPrivilegeEscalation: false
  privileged: false
  readOnlyRootFilesystem: true
  capabilities:
    drop:
      - ALL
{{- end -}}

{{/*
Requests equal to limits: (list where resources extra). `extra` (GPUs) is added to both.
*/}}
{{- define "tickserve.resources" -}}
{{- $where := index . 0 -}}
{{- $limits := (index . 1).limits -}}
{{- range $name, $asked := (index . 1).requests -}}
{{- if ne (toString $asked) (toString (get $limits $name)) -}}
{{- fail (printf "%s.requests.%s: expected the limit, %v, so that the pod is Guaranteed (leave requests out), was %v" $where $name (get $limits $name) $asked) -}}
{{- end -}}
{{- end -}}
{{- $all := merge (dict) $limits (index . 2) -}}
resources:
  requests:
    {{- toYaml $all | nindent 4 }}
  limits:
    {{- toYaml $all | nindent 4 }}
{{- end -}}

{{/* Mi or Gi as Mi, for sums. */}}
{{- define "tickserve.mebibytes" -}}
{{- if hasSuffix "Gi" . -}}
{{- trimSuffix "Gi" . | int64 | mul 1024 -}}
{{- else -}}
{{- trimSuffix "Mi" . | int64 -}}
{{- end -}}
{{- end -}}

{{- define "tickserve.gpuResources" -}}
{{- if .Values.gpu.enabled }}
{{ .Values.gpu.resourceName }}: {{ .Values.gpu.count }}
{{- end -}}
{{- end -}}

{{/* nodeSelector and tolerations of the server, with those of its GPU. */}}
{{- define "tickserve.placement" -}}
{{- $selector := deepCopy .Values.nodeSelector -}}
{{- if and .Values.gpu.enabled .Values.gpu.productSelector -}}
{{- $_ := set $selector "nvidia.com/gpu.product" .Values.gpu.productSelector -}}
{{- end -}}
{{- with $selector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- if or .Values.tolerations .Values.gpu.enabled }}
tolerations:
  {{- with .Values.tolerations }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
  {{- if .Values.gpu.enabled }}
  - key: nvidia.com/gpu
    operator: Exists
    effect: NoSchedule
  {{- end }}
{{- end }}
{{- with .Values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .Values.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- end -}}

{{/* (list context component) */}}
{{- define "tickserve.topologySpread" -}}
{{- $labels := include "tickserve.selectorLabels" . -}}
{{- with (index . 0).Values.topologySpread }}
topologySpreadConstraints:
  {{- range . }}
  - topologyKey: {{ .topologyKey }}
    maxSkew: {{ .maxSkew }}
    whenUnsatisfiable: {{ .whenUnsatisfiable }}
    labelSelector:
      matchLabels:
        {{- $labels | nindent 8 }}
    # Counted for each revision by itself, so that a rollout does not skew its own pods.
    matchLabelKeys:
      - pod-template-hash
  {{- end }}
{{- end }}
{{- end -}}

{{/* Where a pod that is no server runs: (dict nodeSelector tolerations). */}}
{{- define "tickserve.batchPlacement" -}}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}
