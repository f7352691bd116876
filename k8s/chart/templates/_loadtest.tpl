{{/* A pod of the load test: (list context role arguments). */}}
{{- define "tickserve.loadtestPod" -}}
{{- $root := index . 0 -}}
{{- $job := $root.Values.jobs.loadtest -}}
restartPolicy: Never
{{ include "tickserve.podSecurity" $root }}
{{- with include "tickserve.batchPlacement" (dict "nodeSelector" $job.nodeSelector "tolerations" $job.tolerations) | trim }}
{{- . | nindent 0 }}
{{- end }}
containers:
  - name: locust-{{ index . 1 }}
    image: {{ include "tickserve.imageOf" (list $root $root.Values.jobs.loadtestImage) }}
    imagePullPolicy: {{ $root.Values.jobs.loadtestImage.pullPolicy }}
    command: [python, -c]
    args:
      - |
        {{- $root.Files.Get "files/scripts/loadtest_plan.py" | nindent 8 }}
      {{- range index . 2 }}
      - {{ . | quote }}
      {{- end }}
      {{- range $job.extraArgs }}
      - {{ . | quote }}
      {{- end }}
    env:
      - name: HOST
        value: {{ include "tickserve.fullname" $root }}
      - name: MODELS
        value: {{ join " " $root.Values.model.names | quote }}
      - name: USERS
        value: {{ $job.users | quote }}
      - name: DURATION_S
        value: {{ $job.durationSeconds | quote }}
      {{- include "tickserve.trainEnvironment" $root | nindent 6 }}
    {{- include "tickserve.resources" (list "jobs.loadtest.resources" $job.resources (dict)) | nindent 4 }}
    {{- include "tickserve.containerSecurity" $root | nindent 4 }}
    volumeMounts:
      - name: repository
        mountPath: /models
        readOnly: true
      - name: tmp
        mountPath: /tmp
volumes:
  - name: repository
    persistentVolumeClaim:
      claimName: {{ $job.repositoryClaim }}
      readOnly: true
  {{- include "tickserve.scratch" $job.resources | nindent 2 }}
{{- end -}}

{{/* Of master and workers together: they run anew together. */}}
{{- define "tickserve.loadtestName" -}}
{{- $both := printf "master:\n%s\nworkers:\n%s" (include "tickserve.loadtestMasterSpec" . | indent 2) (include "tickserve.loadtestWorkersSpec" . | indent 2) -}}
{{- include "tickserve.jobName" (list . "load" $both) -}}
{{- end -}}

{{- define "tickserve.loadtestService" -}}
{{- include "tickserve.fullname" . }}-loadtest
{{- end -}}
