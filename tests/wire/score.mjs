// Scores one batch over gRPC (a stub made from docs/wire/open_inference.proto), HTTP binary and HTTP JSON, with nothing of
// ours: standard input holds the job, standard output the answers as hexadecimal bytes. The Python test compares them.
import fs from 'node:fs';
import grpc from '@grpc/grpc-js';
import protoLoader from '@grpc/proto-loader';

const job = JSON.parse(fs.readFileSync(0, 'utf8'));
const tensors = job.inputs.map((input) => ({ ...input, bytes: Buffer.from(input.hex, 'hex') }));

function viaGrpc() {
  const loaded = protoLoader.loadSync(job.proto, { keepCase: true, longs: String });
  const { GRPCInferenceService } = grpc.loadPackageDefinition(loaded).inference;
  const client = new GRPCInferenceService(job.grpc, grpc.credentials.createInsecure());
  const request = {
    model_name: job.model,
    model_version: job.version,
    id: 'node',
    inputs: tensors.map(({ name, datatype, shape }) => ({ name, datatype, shape })),
    raw_input_contents: tensors.map(({ bytes }) => bytes),
  };
  return new Promise((resolve, reject) => {
    client.ModelInfer(request, { deadline: Date.now() + 10_000 }, (error, answer) => {
      client.close();
      if (error) return reject(error);
      const outputs = answer.outputs.map((output, index) => [
        output.name, { shape: output.shape.map(Number), hex: answer.raw_output_contents[index].toString('hex') },
      ]);
      resolve({ id: answer.id, model: answer.model_name, version: answer.model_version, outputs: Object.fromEntries(outputs) });
    });
  });
}

function url() {
  return `http://${job.http}/v2/models/${job.model}/versions/${job.version}/infer`;
}

async function viaBinary() {
  const inputs = tensors.map(({ name, datatype, shape, bytes }) => (
    { name, datatype, shape, parameters: { binary_data_size: bytes.length } }));
  const header = Buffer.from(JSON.stringify({ id: 'node', parameters: { binary_data_output: true }, inputs }));
  const answer = await fetch(url(), {
    method: 'POST',
    headers: { 'Inference-Header-Content-Length': String(header.length), 'Content-Type': 'application/octet-stream' },
    body: Buffer.concat([header, ...tensors.map(({ bytes }) => bytes)]),
  });
  const body = Buffer.from(await answer.arrayBuffer());
  if (!answer.ok) throw new Error(body.toString());
  const size = Number(answer.headers.get('inference-header-content-length'));
  const told = JSON.parse(body.subarray(0, size));
  let at = size;
  const outputs = told.outputs.map((output) => {
    const bytes = body.subarray(at, at += output.parameters.binary_data_size);
    return [output.name, { shape: output.shape, hex: bytes.toString('hex') }];
  });
  return { id: told.id, model: told.model_name, version: told.model_version, outputs: Object.fromEntries(outputs) };
}

async function viaJson() {
  // A float32 read as a double is written with the digits of that double, so it comes back as the same float32.
  const inputs = tensors.map(({ name, datatype, shape, bytes }) => (
    { name, datatype, shape, data: Array.from({ length: bytes.length / 4 }, (_, index) => bytes.readFloatLE(4 * index)) }));
  const answer = await fetch(url(), {
    method: 'POST', headers: { 'Content-Type': 'application/json' }, body: JSON.stringify({ id: 'node', inputs }),
  });
  const text = await answer.text();
  if (!answer.ok) throw new Error(text);
  // bundle_id needs all 64 bits: JavaScript's numbers have 53, so it is taken from the text.
  const bundle = /"name":"bundle_id"[^}]*?"data":\[([-0-9,]+)\]/.exec(text)[1].split(',');
  const told = JSON.parse(text);
  const outputs = told.outputs.map(({ name, shape, data }) => {
    const bytes = Buffer.alloc(data.length * (name === 'bundle_id' ? 8 : 4));
    data.forEach((value, index) => (name === 'bundle_id'
      ? bytes.writeBigInt64LE(BigInt(bundle[index]), 8 * index) : bytes.writeFloatLE(value, 4 * index)));
    return [name, { shape, hex: bytes.toString('hex') }];
  });
  return { id: told.id, model: told.model_name, version: told.model_version, outputs: Object.fromEntries(outputs) };
}

const answers = { grpc: await viaGrpc(), http_binary: await viaBinary() };
if (job.json) answers.http_json = await viaJson();
process.stdout.write(JSON.stringify(answers));
