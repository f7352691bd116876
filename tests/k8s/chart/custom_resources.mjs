// Judges custom resources by their own schemas, which npm packages carry: objects as a JSON array on standard input, a list of
// what is wrong for each on standard output.
//
// Such a schema drops a key that it does not know instead of refusing it. So each key is tried with values of the wrong kinds: a
// key for which the schema refuses no value is one that it does not know.
import { readFileSync } from "node:fs";

const wire = new URL("../../wire/node_modules/@kubernetes-models/", import.meta.url);
const operator = "prometheus-operator/_schemas/ComGithubPrometheusOperatorPrometheusOperatorPkgApisMonitoringV1";
const files = {
  "keda.sh/v1alpha1/ScaledObject": "keda/_schemas/ComGithubKedacoreKedaV2ApisKedaV1alpha1ScaledObject.js",
  "monitoring.coreos.com/v1/ServiceMonitor": `${operator}ServiceMonitor.js`,
  "monitoring.coreos.com/v1/PrometheusRule": `${operator}PrometheusRule.js`,
};
const WRONG = [{ "\u0000": [] }, "\u0000", [["\u0000"]], -0.5, true];

function refusals(validate, object) {
  validate(object);
  return validate.errors ?? [];
}

function* places(value, path = []) {
  for (const [key, inner] of Object.entries(value ?? {})) {
    yield [...path, key];
    if (inner !== null && typeof inner === "object") yield* places(inner, [...path, key]);
  }
}

function replaced(object, path, value) {
  const copy = structuredClone(object);
  const parent = path.slice(0, -1).reduce((at, key) => at[key], copy);
  parent[path.at(-1)] = value;
  return copy;
}

function isKnown(validate, object, path) {
  const pointer = "/" + path.map((key) => key.replaceAll("~", "~0").replaceAll("/", "~1")).join("/");
  return WRONG.some((value) =>
    refusals(validate, replaced(object, path, value)).some((error) => error.instancePath.startsWith(pointer)),
  );
}

async function judge(object) {
  const { validate } = await import(new URL(files[`${object.apiVersion}/${object.kind}`], wire));
  const wrong = refusals(validate, object).map((error) => `${error.instancePath} ${error.keyword} ${JSON.stringify(error.params)}`);
  const unknown = [...places(object.spec, ["spec"])].filter((path) => !isKnown(validate, object, path));
  return [...wrong, ...unknown.map((path) => `${path.join("/")} is not known`)];
}

const objects = JSON.parse(readFileSync(0, "utf8"));
console.log(JSON.stringify(await Promise.all(objects.map(judge))));
