{{/* What jobs have in common. */}}

{{/*
The name of a job: (list context suffix spec). It carries a digest of its rendered spec, because that of a Job cannot be changed: whatever
changes it (values, an image, a label, a script of the chart) makes another Job, and the same spec leaves the one that ran alone.
*/}}
{{- define "tickserve.jobName" -}}
{{- printf "%s-%s-%s" (include "tickserve.fullname" (index . 0) | trunc 34 | trimSuffix "-") (index . 1) (include "tickserve.digest" (index . 2)) -}}
{{- end -}}

{{/* Of YAML, its comments left out. */}}
{{- define "tickserve.digest" -}}
{{- fromYaml . | toJson | sha256sum | trunc 8 -}}
{{- end -}}

{{/* Which failures are worth a second try: a lost node is; bad data, a wrong configuration and a refused gate are not. */}}
{{- define "tickserve.podFailurePolicy" -}}
podFailurePolicy:
  rules:
    - action: Ignore
      onPodConditions:
        - type: DisruptionTarget
          status: "True"
    - action: {{ index . 1 }}
      onExitCodes:
        containerName: {{ index . 0 }}
        operator: In
        # 1 a gate refused, 2 wrong configuration, 3 bad data
        values: [1, 2, 3]
{{- end -}}

{{/* Environment of the image `train`, whose own folders are read-only here. */}}
{{- define "tickserve.trainEnvironment" -}}
- name: HOME
  value: /tmp
- name: NUMBA_CACHE_DIR
  value: /tmp/numba
- name: MPLCONFIGDIR
  value: /tmp/matplotlib
{{- end -}}

{{/* Scratch space as large as the limit allows: (resources). */}}
{{- define "tickserve.scratch" -}}
- name: tmp
  emptyDir:
    sizeLimit: {{ index .limits "ephemeral-storage" }}
{{- end -}}
