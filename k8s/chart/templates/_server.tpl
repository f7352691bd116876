{{/* The container that serves: arguments, probes, and what ends it. */}}

{{/*
Added to the image's own arguments, of which the last value wins; but a second --model-repository is a repository more, so there is
none here.
*/}}
{{- define "tickserve.serverArguments" -}}
{{- $apis := "shared-memory,model-config,model-repository,statistics,trace,logging" -}}
{{- $httpApis := eq .Values.server.http "probes" | ternary (printf "%s,metadata,inference" $apis) $apis -}}
- --exit-timeout-secs={{ .Values.exitTimeoutSeconds }}
- --http-max-input-size={{ .Values.server.httpMaxInputBytes | int64 }}
- --http-thread-count={{ .Values.server.httpThreads }}
{{- if .Values.server.logVerbose }}
- --log-verbose={{ .Values.server.logVerbose }}
{{- end }}
{{- if .Values.tls.enabled }}
- --grpc-use-ssl=true
- --grpc-server-cert=/etc/tickserve/tls/tls.crt
- --grpc-server-key=/etc/tickserve/tls/tls.key
{{- if .Values.tls.clientCa }}
- --grpc-use-ssl-mutual=true
- --grpc-root-cert=/etc/tickserve/tls/ca.crt
{{- end }}
{{- end }}
{{- if .Values.sidecar.enabled }}
- --http-address=127.0.0.1
- --grpc-address=127.0.0.1
# Or it would be that of HTTP, where Prometheus does not reach it.
- --metrics-address=0.0.0.0
- --allow-client-shm=true
{{- end }}
- --http-restricted-api={{ $httpApis }}:triton-restricted=$(TRITON_RESTRICTED_VALUE)
- --grpc-restricted-protocol={{ $apis }}:triton-restricted=$(TRITON_RESTRICTED_VALUE)
{{- range .Values.server.extraArgs }}
- {{ . | quote }}
{{- end }}
{{- end -}}

{{/*
(list context path values). Beside an engine the server is on loopback, where the kubelet does not reach it: the container asks
itself, with what its image has.
*/}}
{{- define "tickserve.probe" -}}
{{- $root := index . 0 -}}
{{- $url := printf "http://127.0.0.1:8000%s" (index . 1) -}}
{{- with index . 2 -}}
{{- if not $root.Values.sidecar.enabled -}}
httpGet:
  path: {{ index $ 1 }}
  port: http
{{- else if eq $root.Values.sidecar.server "triton" -}}
exec:
  command: [curl, --fail, --silent, --output, /dev/null, --max-time, {{ .timeoutSeconds | quote }}, {{ $url | quote }}]
{{- else -}}
exec:
  command: [python, -c, {{ printf "import urllib.request; urllib.request.urlopen('%s', timeout=%v)" $url .timeoutSeconds | quote }}]
{{- end }}
periodSeconds: {{ .periodSeconds }}
timeoutSeconds: {{ .timeoutSeconds }}
failureThreshold: {{ .failureThreshold }}
{{- end -}}
{{- end -}}

{{- define "tickserve.probes" -}}
# Covers the load of every model and its warm-up.
startupProbe:
  {{- include "tickserve.probe" (list . "/v2/health/ready" .Values.probes.startup) | nindent 2 }}
# The server alone: a model that is not ready is no reason to kill the others.
livenessProbe:
  {{- include "tickserve.probe" (list . "/v2/health/live" .Values.probes.liveness) | nindent 2 }}
# Strict: every model, warmed up.
readinessProbe:
  {{- include "tickserve.probe" (list . "/v2/health/ready" .Values.probes.readiness) | nindent 2 }}
{{- end -}}

{{- define "tickserve.serverContainer" -}}
- name: triton
  image: {{ include "tickserve.image" . }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  # Whatever can read or change the server, beyond health, metadata and inference, asks for a header whose value is in a
  # Secret; without the Secret the pod does not start.
  args:
    {{- include "tickserve.serverArguments" . | nindent 4 }}
  env:
    - name: TRITON_RESTRICTED_VALUE
      valueFrom:
        secretKeyRef:
          name: {{ include "tickserve.restrictedSecret" . }}
          key: value
  ports:
    - name: http
      containerPort: 8000
      protocol: TCP
    - name: grpc
      containerPort: 8001
      protocol: TCP
    - name: metrics
      containerPort: 8002
      protocol: TCP
  {{- include "tickserve.probes" . | nindent 2 }}
  lifecycle:
    preStop:
      # On SIGTERM Triton unloads at once, while requests are still routed here: leave the endpoints first.
      sleep:
        seconds: {{ .Values.preStopSeconds }}
  {{- include "tickserve.resources" (list "resources" .Values.resources (include "tickserve.gpuResources" . | fromYaml)) | nindent 2 }}
  {{- include "tickserve.containerSecurity" . | nindent 2 }}
  volumeMounts:
    {{- include "tickserve.modelMount" . | nindent 4 }}
    {{- if .Values.tls.enabled }}
    - name: tls
      mountPath: /etc/tickserve/tls
      readOnly: true
    {{- end }}
    - name: tmp
      mountPath: /tmp
{{- end -}}

{{/* How long a rollout may take before it is called failed: the sync, the load, and a minute for the scheduler. */}}
{{- define "tickserve.progressDeadline" -}}
{{- $load := mul .Values.probes.startup.periodSeconds .Values.probes.startup.failureThreshold -}}
{{- add $load (include "tickserve.synced" . | eq "true" | ternary .Values.model.sync.timeoutSeconds 0) 240 -}}
{{- end -}}
