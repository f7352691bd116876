{{/* A pod of the Ray cluster: (list context container). All see the same data, results and code at the same paths. */}}
{{- define "tickserve.rayPod" -}}
{{- $root := index . 0 -}}
{{- $job := $root.Values.jobs.rayJob -}}
{{- $key := eq (index . 1) "submitter" | ternary "submitterResources" "resources" -}}
{{- $resources := get $job $key -}}
{{- include "tickserve.podSecurity" $root }}
{{- with include "tickserve.batchPlacement" (dict "nodeSelector" $job.nodeSelector "tolerations" $job.tolerations) | trim }}
{{- . | nindent 0 }}
{{- end }}
containers:
  - name: ray-{{ index . 1 }}
    image: {{ include "tickserve.imageOf" (list $root $job.image) }}
    imagePullPolicy: {{ $job.image.pullPolicy }}
    workingDir: /work
    env:
      - name: TICKSERVE_UNIVERSE__RAY_ADDRESS
        value: auto
      - name: RAY_USAGE_STATS_ENABLED
        value: "0"
      {{- include "tickserve.trainEnvironment" $root | nindent 6 }}
    {{- include "tickserve.resources" (list (printf "jobs.rayJob.%s" $key) $resources (dict)) | nindent 4 }}
    {{- include "tickserve.containerSecurity" $root | nindent 4 }}
    volumeMounts:
      - name: data
        mountPath: /data
        readOnly: true
      - name: work
        mountPath: /work
      - name: shared-memory
        mountPath: /dev/shm
      - name: tmp
        mountPath: /tmp
volumes:
  - name: data
    persistentVolumeClaim:
      claimName: {{ $job.dataClaim }}
      readOnly: true
  - name: work
    persistentVolumeClaim:
      claimName: {{ $job.outputClaim }}
  # Ray's object store; counts against the memory limit.
  - name: shared-memory
    emptyDir:
      medium: Memory
      sizeLimit: {{ div (include "tickserve.mebibytes" $resources.limits.memory | int64) 3 }}Mi
  {{- include "tickserve.scratch" $resources | nindent 2 }}
{{- end -}}
