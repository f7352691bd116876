{{/*
What the schema cannot say, because it is about several values together. Every message: the keys, "expected X, was Y". All that
is wrong is said at once.
*/}}
{{- define "tickserve.validate" -}}
{{- $v := .Values -}}
{{- $wrong := list -}}
{{- range list "grace" "scaling" "model" "network" "storage" "server" "sidecar" "jobs" "freeze" "labels" -}}
{{- $said := include (printf "tickserve.validate.%s" .) $ | trim -}}
{{- range splitList "\n" $said -}}
{{- if trim . -}}{{- $wrong = append $wrong (trim .) -}}{{- end -}}
{{- end -}}
{{- end -}}
{{- if $wrong -}}
{{- fail (printf "\n\nvalues that do not go together:\n- %s\n" (join "\n- " $wrong)) -}}
{{- end -}}
{{- end -}}

{{- define "tickserve.validate.grace" -}}
{{- $v := .Values -}}
{{- $stop := $v.sidecar.enabled | ternary $v.sidecar.engine.stopSeconds $v.preStopSeconds -}}
{{- $name := $v.sidecar.enabled | ternary "sidecar.engine.stopSeconds" "preStopSeconds" -}}
{{- $least := add $stop $v.exitTimeoutSeconds 5 -}}
{{- if lt (int64 $v.terminationGracePeriodSeconds) $least }}
terminationGracePeriodSeconds: expected at least {{ $least }} ({{ $name }} {{ $stop }} + exitTimeoutSeconds {{ $v.exitTimeoutSeconds }} + 5 to unload), was {{ $v.terminationGracePeriodSeconds }}
{{- end }}
{{- range $name, $probe := $v.probes }}
{{- if gt (int64 $probe.timeoutSeconds) (int64 $probe.periodSeconds) }}
probes.{{ $name }}.timeoutSeconds: expected no more than periodSeconds {{ $probe.periodSeconds }}, was {{ $probe.timeoutSeconds }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "tickserve.validate.scaling" -}}
{{- $v := .Values -}}
{{- if and $v.autoscaling.enabled $v.keda.enabled }}
autoscaling.enabled, keda.enabled: expected one of them (two would fight over the replicas), was both
{{- end }}
{{- range $name := list "autoscaling" "keda" }}
{{- $each := get $v $name }}
{{- if and $each.enabled (gt (int64 $each.minReplicas) (int64 $each.maxReplicas)) }}
{{ $name }}.minReplicas: expected no more than maxReplicas {{ $each.maxReplicas }}, was {{ $each.minReplicas }}
{{- end }}
{{- if and $each.enabled $v.sidecar.enabled }}
{{ $name }}.enabled: expected false with sidecar.enabled (a second engine would trade twice), was true
{{- end }}
{{- end }}
{{- if $v.keda.enabled }}
{{- if not $v.keda.prometheusAddress }}
keda.prometheusAddress: expected the address of your Prometheus, was empty
{{- end }}
{{- if and $v.keda.authModes (not $v.keda.authenticationRef) }}
keda.authModes: expected keda.authenticationRef with it, was empty
{{- end }}
{{- range $v.keda.preScale }}
{{- if gt (int64 .replicas) (int64 $v.keda.maxReplicas) }}
keda.preScale {{ .name }}: expected no more than keda.maxReplicas {{ $v.keda.maxReplicas }} replicas, was {{ .replicas }}
{{- end }}
{{- end }}
{{- else if $v.keda.preScale }}
keda.preScale: expected keda.enabled with it (nothing else scales by the clock), was false
{{- end }}
{{- end -}}

{{- define "tickserve.validate.model" -}}
{{- $model := .Values.model -}}
{{- if and (ne $model.source "pvc") (not $model.verify.publicKeySecret) }}
model.verify.publicKeySecret: expected the Secret of the public keys (what comes from {{ $model.source }} is verified before it is served), was empty
{{- end }}
{{- if and (eq $model.source "s3") (not $model.s3.bucket) }}
model.s3.bucket: expected a name with model.source s3, was empty
{{- end }}
{{- if and (eq $model.source "gcs") (not $model.gcs.bucket) }}
model.gcs.bucket: expected a name with model.source gcs, was empty
{{- end }}
{{- if and (eq $model.source "gcs") (not $model.gcs.credentialsSecret) }}
model.gcs.credentialsSecret: expected the Secret of the HMAC keys with model.source gcs, was empty
{{- end }}
{{- if and (eq $model.source "oci") (not (regexMatch "(:[^/]+|@sha256:[0-9a-f]{64})$" $model.oci.reference)) }}
model.oci.reference: expected an image with a tag or a digest with model.source oci, was {{ $model.oci.reference | quote }}
{{- end }}
{{- end -}}

{{- define "tickserve.validate.network" -}}
{{- $v := .Values -}}
{{- if and $v.networkPolicy.enabled (has $v.model.source (list "s3" "gcs")) (not $v.networkPolicy.egress.objectStore) }}
networkPolicy.egress.objectStore: expected the addresses of the object store (the model sync could not reach it), was empty
{{- end }}
{{- with $v.networkPolicy.egress.dns }}
{{- if not (or .namespaceLabels .podLabels .cidrs) }}
networkPolicy.egress.dns: expected labels or cidrs (no peer at all is everybody), was neither
{{- end }}
{{- end }}
{{- range $v.networkPolicy.callers }}
{{- if and .cidr (or .namespaceLabels .podLabels) }}
networkPolicy.callers {{ .name }}: expected labels or a cidr (two entries for both), was both
{{- end }}
{{- end }}
{{- if $v.tls.enabled }}
{{- if not $v.tls.secretName }}
tls.secretName: expected the Secret of tls.crt and tls.key, was empty
{{- end }}
{{- if ne $v.server.http "probes" }}
server.http: expected probes with tls.enabled (Triton's HTTP has no TLS and would answer in plaintext), was {{ $v.server.http }}
{{- end }}
{{- end }}
{{- if and (not $v.serviceAccount.create) (not $v.serviceAccount.name) }}
serviceAccount.name: expected a name with serviceAccount.create false (never the namespace's default account), was empty
{{- end }}
{{- end -}}

{{- define "tickserve.validate.storage" -}}
{{- $v := .Values -}}
{{- $copy := include "tickserve.synced" . | eq "true" | ternary $v.model.sizeLimit "0Mi" -}}
{{- $needs := add (include "tickserve.mebibytes" $copy) (include "tickserve.mebibytes" $v.tmp.sizeLimit) -}}
{{- $has := include "tickserve.mebibytes" (index $v.resources.limits "ephemeral-storage") | int64 -}}
{{- if gt $needs $has }}
resources.limits.ephemeral-storage: expected at least {{ $needs }}Mi (model.sizeLimit + tmp.sizeLimit, which count against it), was {{ index $v.resources.limits "ephemeral-storage" }}
{{- end }}
{{- end -}}

{{- define "tickserve.validate.server" -}}
{{- $owned := list "model-repository" "model-control-mode" "load-model" "strict-readiness" "disable-auto-complete-config" "exit-on-error" "exit-timeout-secs" "http-max-input-size" "http-thread-count" "http-port" "grpc-port" "metrics-port" "http-address" "grpc-address" "metrics-address" "allow-http" "allow-grpc" "allow-metrics" "allow-client-shm" "log-verbose" "grpc-use-ssl" "grpc-use-ssl-mutual" "grpc-server-cert" "grpc-server-key" "grpc-root-cert" "http-restricted-api" "grpc-restricted-protocol" -}}
{{- range .Values.server.extraArgs }}
{{- $option := trimPrefix "--" . | splitList "=" | first }}
{{- if has $option $owned }}
server.extraArgs: expected none of the arguments that the chart or the image sets, was --{{ $option }}
{{- end }}
{{- end }}
{{- if and .Values.gpu.productSelector (not .Values.gpu.enabled) }}
gpu.productSelector: expected gpu.enabled with it, was false
{{- end }}
{{- end -}}

{{- define "tickserve.validate.sidecar" -}}
{{- $v := .Values -}}
{{- if $v.sidecar.enabled }}
{{- with $v.sidecar.engine.image }}
{{- if not (and .repository (or .tag .digest)) }}
sidecar.engine.image: expected a repository, and a tag or a digest, was {{ printf "%s:%s" .repository .tag | quote }}
{{- end }}
{{- end }}
{{- range $v.sidecar.engine.env }}
{{- if and (hasKey . "value") (regexMatch "(?i)SECRET|TOKEN|CREDENTIAL|PASS(WORD|WD|PHRASE)?(_|$)|PWD(_|$)|KEY(_|$)" .name) (not (hasPrefix "/" (toString .value))) }}
sidecar.engine.env {{ .name }}: expected valueFrom (no secret belongs in values), was a value
{{- end }}
{{- end }}
{{- $shared := include "tickserve.mebibytes" $v.sidecar.sharedMemorySize | int64 -}}
{{- if gt $shared (div (include "tickserve.mebibytes" $v.resources.limits.memory | int64) 2) }}
sidecar.sharedMemorySize: expected no more than half of resources.limits.memory {{ $v.resources.limits.memory }} (it counts against it), was {{ $v.sidecar.sharedMemorySize }}
{{- end }}
{{- if and (eq $v.sidecar.server "embedded") $v.gpu.enabled }}
gpu.enabled: expected false with sidecar.server embedded (the image server-cpu uses no GPU), was true
{{- end }}
{{- if $v.tls.enabled }}
tls.enabled: expected false with sidecar.enabled (gRPC is on loopback), was true
{{- end }}
{{- if gt (int64 $v.replicaCount) 1 }}
replicaCount: expected 1 with sidecar.enabled (a second engine would trade twice), was {{ $v.replicaCount }}
{{- end }}
{{- if $v.serviceMonitor.enabled }}
serviceMonitor.enabled: expected false with sidecar.enabled (there is no Service to scrape), was true
{{- end }}
{{- end }}
{{- end -}}

{{- define "tickserve.validate.jobs" -}}
{{- $jobs := .Values.jobs -}}
{{- if and $jobs.training.enabled (not $jobs.training.symbols) }}
jobs.training.symbols: expected at least one, was none
{{- end }}
{{- if and $jobs.rayJob.enabled (not $jobs.rayJob.rayVersion) }}
jobs.rayJob.rayVersion: expected the version of Ray in jobs.rayJob.image, was empty
{{- end }}
{{- if $jobs.engineBuild.enabled }}
{{- if not $jobs.engineBuild.model }}
jobs.engineBuild.model: expected the name of a published model, was empty
{{- end }}
{{- if not $jobs.engineBuild.nodePools }}
jobs.engineBuild.nodePools: expected at least one, was none
{{- end }}
{{- end }}
{{- if $jobs.loadtest.enabled }}
{{- if or .Values.sidecar.enabled .Values.tls.enabled (ne .Values.server.http "open") }}
jobs.loadtest.enabled: expected false where HTTP answers probes only, with TLS and with sidecar.enabled (it speaks plain HTTP and gRPC to the Service), was true
{{- end }}
{{- if not .Values.model.names }}
model.names: expected at least one with jobs.loadtest.enabled, was none
{{- end }}
{{- end }}
{{- end -}}

{{- define "tickserve.validate.labels" -}}
{{- $v := .Values -}}
{{- range $name, $labels := dict "podLabels" $v.podLabels "serviceMonitor.labels" $v.serviceMonitor.labels "prometheusRule.labels" $v.prometheusRule.labels "dashboards.labels" $v.dashboards.labels }}
{{- range $key, $_ := $labels }}
{{- if or (hasPrefix "app.kubernetes.io/" $key) (hasPrefix "helm.sh/" $key) }}
{{ $name }}: expected none of the labels that the chart sets (selectors need them), was {{ $key }}
{{- end }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "tickserve.validate.freeze" -}}
{{- $freeze := .Values.changeFreeze -}}
{{- if and $freeze.enabled (not $freeze.override) -}}
{{- $now := now | unixEpoch | int64 -}}
{{- $last := 0 | int64 -}}
{{- range $freeze.windows }}
{{- $start := mustToDate "2006-01-02T15:04:05Z07:00" .start | unixEpoch | int64 -}}
{{- $end := mustToDate "2006-01-02T15:04:05Z07:00" .end | unixEpoch | int64 -}}
{{- $last = max $last $end -}}
{{- if ge $start $end }}
changeFreeze.windows {{ .name }}: expected an end after its start, was {{ .start }} to {{ .end }}
{{- else if and (le $start $now) (lt $now $end) }}
changeFreeze: expected no change in session, was inside {{ .name }}, {{ .start }} to {{ .end }} (helm rollback goes on; changeFreeze.override breaks the glass)
{{- end }}
{{- end }}
{{- if le $last $now }}
changeFreeze.windows: expected one that is still to come (render them anew: tickserve deploy render), was {{ if $freeze.windows }}{{ len $freeze.windows }}, all over{{ else }}empty{{ end }}
{{- end }}
{{- end -}}
{{- end -}}
