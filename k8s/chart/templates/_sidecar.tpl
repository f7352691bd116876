{{/* The server beside an engine: a native sidecar, so that it is ready before the engine starts and ends after it. */}}

{{- define "tickserve.sidecarMounts" -}}
- name: shared-memory
  mountPath: /dev/shm
{{- if eq .Values.sidecar.server "embedded" }}
# The server writes there where it is and what opens its shared memory; the engine, the same user, reads it.
- name: run
  mountPath: /run/tickserve
{{- end }}
{{- end -}}

{{- define "tickserve.sidecarServer" -}}
- name: triton
  restartPolicy: Always
  image: {{ include "tickserve.image" . }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  {{- if eq .Values.sidecar.server "triton" }}
  args:
    {{- include "tickserve.serverArguments" . | nindent 4 }}
  env:
    - name: TRITON_RESTRICTED_VALUE
      valueFrom:
        secretKeyRef:
          name: {{ include "tickserve.restrictedSecret" . }}
          key: value
  ports:
    - name: metrics
      containerPort: 8002
      protocol: TCP
  {{- else }}
  args: [serve, --repository, /models]
  env:
    - name: XDG_RUNTIME_DIR
      value: /run/tickserve
    {{- if .Values.model.verify.publicKeySecret }}
    # It checks the signatures once more, before it loads.
    - name: TICKSERVE_REPOSITORY__TRUSTED_KEYS_FILE
      value: /etc/tickserve/keys/{{ .Values.model.verify.publicKeyFile }}
    - name: TICKSERVE_REPOSITORY__REQUIRE_SIGNATURE
      value: "true"
    {{- end }}
  {{- end }}
  {{- include "tickserve.probes" . | nindent 2 }}
  {{- include "tickserve.resources" (list "resources" .Values.resources (include "tickserve.gpuResources" . | fromYaml)) | nindent 2 }}
  {{- include "tickserve.containerSecurity" . | nindent 2 }}
  volumeMounts:
    {{- include "tickserve.modelMount" . | nindent 4 }}
    {{- if and (eq .Values.sidecar.server "embedded") .Values.model.verify.publicKeySecret }}
    - name: public-key
      mountPath: /etc/tickserve/keys
      readOnly: true
    {{- end }}
    {{- include "tickserve.sidecarMounts" . | nindent 4 }}
    - name: tmp
      mountPath: /tmp
{{- end -}}

{{- define "tickserve.engineContainer" -}}
{{- $engine := .Values.sidecar.engine -}}
- name: engine
  image: {{ include "tickserve.imageOf" (list . $engine.image) }}
  imagePullPolicy: {{ $engine.image.pullPolicy }}
  {{- with $engine.command }}
  command:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $engine.args }}
  args:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  env:
    {{- if eq .Values.sidecar.server "triton" }}
    # What opens the server's shared-memory calls, and no other server's.
    - name: TRITON_RESTRICTED_VALUE
      valueFrom:
        secretKeyRef:
          name: {{ include "tickserve.restrictedSecret" . }}
          key: value
    - name: TICKSERVE_CREDENTIAL
      value: triton-restricted=$(TRITON_RESTRICTED_VALUE)
    {{- else }}
    - name: XDG_RUNTIME_DIR
      value: /run/tickserve
    {{- end }}
    {{- with $engine.env }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with $engine.ports }}
  ports:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- range $name := list "startupProbe" "livenessProbe" "readinessProbe" }}
  {{- with get $engine $name }}
  {{ $name }}:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- end }}
  {{- include "tickserve.resources" (list "sidecar.engine.resources" $engine.resources (dict)) | nindent 2 }}
  {{- include "tickserve.containerSecurity" . | nindent 2 }}
  volumeMounts:
    {{- include "tickserve.sidecarMounts" . | nindent 4 }}
    # The manifests that the client checks answers against.
    {{- include "tickserve.modelMount" . | nindent 4 }}
    - name: tmp
      mountPath: /tmp
{{- end -}}
