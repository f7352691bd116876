{{/* The model repository: where it comes from, the init container that verifies it, and the volumes. */}}

{{/* Whether a verified copy is made; a claim may be served as it is. */}}
{{- define "tickserve.synced" -}}
{{- if or (ne .Values.model.source "pvc") .Values.model.verify.publicKeySecret -}}true{{- end -}}
{{- end -}}

{{- define "tickserve.modelSource" -}}
{{- $model := .Values.model -}}
{{- if eq $model.source "s3" -}}
s3://{{ trimSuffix "/" (printf "%s/%s" $model.s3.bucket (trimAll "/" $model.s3.prefix)) }}
{{- else if eq $model.source "gcs" -}}
gs://{{ trimSuffix "/" (printf "%s/%s" $model.gcs.bucket (trimAll "/" $model.gcs.prefix)) }}
{{- else if eq $model.source "oci" -}}
/source{{ with trimAll "/" $model.oci.path }}/{{ . }}{{ end }}
{{- else -}}
/source
{{- end -}}
{{- end -}}

{{/* Copies what the trusted keys signed to the volume that Triton reads; what is not signed does not arrive. */}}
{{- define "tickserve.syncContainer" -}}
- name: model-sync
  image: {{ default (include "tickserve.image" .) .Values.model.sync.image }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  command:
    - python3
    - -m
    - tickserve.cli
    - repo
    - sync
  args:
    - --source
    - {{ include "tickserve.modelSource" . | quote }}
    - --into
    - /models
    - --public-key
    - /etc/tickserve/keys/{{ .Values.model.verify.publicKeyFile }}
    - --require-signature
    - --size-limit
    - {{ .Values.model.sizeLimit }}
    {{- range .Values.model.names }}
    - --model
    - {{ . }}
    {{- end }}
  env:
    - name: HOME
      value: /tmp
    {{- if eq .Values.model.source "s3" }}
    {{- with .Values.model.s3.region }}
    - name: AWS_DEFAULT_REGION
      value: {{ . | quote }}
    {{- end }}
    {{- with .Values.model.s3.endpoint }}
    - name: TICKSERVE_REPOSITORY__S3_ENDPOINT_URL
      value: {{ . | quote }}
    {{- end }}
    {{- end }}
    {{- $secret := "" }}
    {{- if has .Values.model.source (list "s3" "gcs") }}
    {{- $secret = (get .Values.model .Values.model.source).credentialsSecret }}
    {{- end }}
    {{- if $secret }}
    {{- range list "AWS_ACCESS_KEY_ID" "AWS_SECRET_ACCESS_KEY" }}
    - name: {{ . }}
      valueFrom:
        secretKeyRef:
          name: {{ $secret }}
          key: {{ . }}
    {{- end }}
    {{- end }}
  {{- include "tickserve.resources" (list "resources" .Values.resources (dict)) | nindent 2 }}
  {{- include "tickserve.containerSecurity" . | nindent 2 }}
  volumeMounts:
    - name: models
      mountPath: /models
    - name: public-key
      mountPath: /etc/tickserve/keys
      readOnly: true
    {{- if has .Values.model.source (list "pvc" "oci") }}
    - name: source
      mountPath: /source
      readOnly: true
      {{- if and (eq .Values.model.source "pvc") .Values.model.pvc.subPath }}
      subPath: {{ .Values.model.pvc.subPath }}
      {{- end }}
    {{- end }}
    - name: tmp
      mountPath: /tmp
{{- end -}}

{{- define "tickserve.modelVolumes" -}}
{{- $synced := include "tickserve.synced" . -}}
{{- if $synced }}
- name: models
  emptyDir:
    sizeLimit: {{ .Values.model.sizeLimit }}
- name: public-key
  secret:
    secretName: {{ .Values.model.verify.publicKeySecret }}
    defaultMode: 0440
{{- end }}
{{- if eq .Values.model.source "pvc" }}
- name: {{ $synced | eq "true" | ternary "source" "models" }}
  persistentVolumeClaim:
    claimName: {{ .Values.model.pvc.claimName }}
    readOnly: true
{{- else if eq .Values.model.source "oci" }}
- name: source
  image:
    reference: {{ .Values.model.oci.reference }}
    pullPolicy: {{ .Values.model.oci.pullPolicy }}
{{- end }}
{{- end -}}

{{/* What Triton sees of them. */}}
{{- define "tickserve.modelMount" -}}
- name: models
  mountPath: /models
  readOnly: true
  {{- if and (not (include "tickserve.synced" .)) .Values.model.pvc.subPath }}
  subPath: {{ .Values.model.pvc.subPath }}
  {{- end }}
{{- end -}}
