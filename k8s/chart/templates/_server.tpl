{{/* The container that serves: arguments, probes, and what ends it. */}}

{{/* Added to the image's own arguments, of which the last value wins. */}}
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
- --grpc-address=127.0.0.1
- --allow-client-shm=true
{{- end }}
- --http-restricted-api={{ $httpApis }}:triton-restricted=$(TRITON_RESTRICTED_VALUE)
- --grpc-restricted-protocol={{ $apis }}:triton-restricted=$(TRITON_RESTRICTED_VALUE)
{{- range .Values.server.extraArgs }}
- {{ . | quote }}
{{- end }}
{{- end -}}

{{/* (list probe path values) */}}
{{- define "tickserve.probe" -}}
httpGet:
  path: {{ index . 0 }}
  port: http
periodSeconds: {{ (index . 1).periodSeconds }}
timeoutSeconds: {{ (index . 1).timeoutSeconds }}
failureThreshold: {{ (index . 1).failureThreshold }}
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
  # Covers the load of every model and its warm-up.
  startupProbe:
    {{- include "tickserve.probe" (list "/v2/health/ready" .Values.probes.startup) | nindent 4 }}
  # The server alone: a model that is not ready is no reason to kill the others.
  livenessProbe:
    {{- include "tickserve.probe" (list "/v2/health/live" .Values.probes.liveness) | nindent 4 }}
  # Strict: every model, warmed up.
  readinessProbe:
    {{- include "tickserve.probe" (list "/v2/health/ready" .Values.probes.readiness) | nindent 4 }}
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
