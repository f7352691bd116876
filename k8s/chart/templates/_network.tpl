{{/* Peers and ports of network policies. */}}

{{/* One peer: (dict namespaceLabels podLabels), or (dict cidr). Without namespaceLabels: of this namespace. */}}
{{- define "tickserve.peer" -}}
{{- $pods := .podLabels -}}
{{- $spaces := .namespaceLabels -}}
{{- $parts := list -}}
{{- if $spaces }}{{ $parts = append $parts (dict "namespaceSelector" (dict "matchLabels" $spaces)) }}{{ end -}}
{{- if $pods }}{{ $parts = append $parts (dict "podSelector" (dict "matchLabels" $pods)) }}{{ end -}}
{{- if .cidr }}{{ $parts = append $parts (dict "ipBlock" (dict "cidr" .cidr)) }}{{ end -}}
{{- $peer := dict -}}
{{- range $parts }}{{ $peer = merge $peer . }}{{ end -}}
- {{ toYaml $peer | nindent 2 | trim }}
{{- end -}}

{{- define "tickserve.portNumber" -}}
{{- get (dict "http" "8000" "grpc" "8001" "metrics" "8002") . -}}
{{- end -}}

{{/* Names are looked up here. */}}
{{- define "tickserve.dnsEgress" -}}
{{- with .Values.networkPolicy.egress.dns -}}
- to:
    {{- if or .namespaceLabels .podLabels }}
    {{- include "tickserve.peer" . | nindent 4 }}
    {{- end }}
    {{- range .cidrs }}
    {{- include "tickserve.peer" (dict "cidr" .) | nindent 4 }}
    {{- end }}
  ports:
    - {port: {{ .port }}, protocol: UDP}
    - {port: {{ .port }}, protocol: TCP}
{{- end -}}
{{- end -}}

{{/* The model sync's way to its source; nothing where that is a volume. */}}
{{- define "tickserve.syncEgress" -}}
{{- if has .Values.model.source (list "s3" "gcs") }}
{{ include "tickserve.dnsEgress" . }}
{{- range .Values.networkPolicy.egress.objectStore }}
- to:
    - ipBlock:
        cidr: {{ .cidr }}
  ports:
    - {port: {{ .port }}, protocol: TCP}
{{- end }}
{{- end }}
{{- end -}}
