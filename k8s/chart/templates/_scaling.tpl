{{/* The scaling signal, as PromQL. */}}

{{/* Labels of this release's series: job is the Service's name. */}}
{{- define "tickserve.seriesMatch" -}}
namespace={{ .Release.Namespace | quote }},job={{ include "tickserve.fullname" . | quote }}
{{- with .Values.model.names }},model=~{{ join "|" . | quote }}{{ end }}
{{- end -}}

{{/* Seconds a request waits in Triton's queue. */}}
{{- define "tickserve.queueQuery" -}}
{{- $match := include "tickserve.seriesMatch" . -}}
1e-6 * sum(rate(nv_inference_queue_duration_us{{ printf "{%s}" $match }}[1m])) / clamp_min(sum(rate(nv_inference_request_success{{ printf "{%s}" $match }}[1m])), 1)
{{- end -}}

{{/* Deadlines that engines missed, a second. None is counted before the first: that is nought, not an error. */}}
{{- define "tickserve.missesQuery" -}}
sum(rate(tickserve_client_deadline_misses_total{{ with .Values.model.names }}{model=~{{ join "|" . | quote }}}{{ end }}[1m])) or vector(0)
{{- end -}}
