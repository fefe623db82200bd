// A client in another language: it knows the proto files, the endpoint, the authority's certificate
// and a password, and nothing else of mcloud.
//
//   node client.js ENDPOINT AUTHORITY_PEM PROTOS_DIR GOOGLE_PROTOS_DIR < password
//
// It logs in, makes a flavor and an image, watches instances, creates one, deletes it, and prints
// what it saw as JSON.
"use strict";

const crypto = require("node:crypto");
const fs = require("node:fs");
const path = require("node:path");
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");

const [endpoint, authority, protos, googleProtos] = process.argv.slice(2);
const DEADLINE_MS = 120_000;
const FILES = [
  "mcloud/identity/v1/token_service.proto",
  "mcloud/compute/v1/flavor_service.proto",
  "mcloud/compute/v1/instance_service.proto",
  "mcloud/compute/v1/operation_service.proto",
  "mcloud/image/v1/image_service.proto",
  "mcloud/scheduler/v1/placement.proto",
  "google/rpc/error_details.proto",
];

const definition = loader.loadSync(
  FILES.map((name) => path.join(name.startsWith("google") ? googleProtos : protos, name)),
  {
    includeDirs: [protos, googleProtos],
    keepCase: true,
    enums: String,
    longs: String,
    defaults: true,
  },
);
const { mcloud } = grpc.loadPackageDefinition(definition);
const credentials = grpc.credentials.createSsl(fs.readFileSync(authority));
// The certificate is for the address and for this name; RFC 6066 allows only names to be asked for.
const options = { "grpc.ssl_target_name_override": "localhost" };
const stub = (Service) => new Service(endpoint, credentials, options);

const tokens = stub(mcloud.identity.v1.TokenService);
const flavors = stub(mcloud.compute.v1.FlavorService);
const instances = stub(mcloud.compute.v1.InstanceService);
const operations = stub(mcloud.compute.v1.OperationService);
const images = stub(mcloud.image.v1.ImageService);

const deadline = () => ({ deadline: Date.now() + DEADLINE_MS });

function bearer(token) {
  const metadata = new grpc.Metadata();
  metadata.set("authorization", `Bearer ${token}`);
  return metadata;
}

/** Call a unary method; of a refusal, the promise fails with the ErrorInfo's reason as `reason`. */
function call(client, method, request, metadata = new grpc.Metadata()) {
  return new Promise((resolve, reject) => {
    client[method](request, metadata, deadline(), (error, answer) => {
      if (error) {
        error.reason = reasonOf(error.metadata.get("grpc-status-details-bin")[0]);
        reject(error);
      } else {
        resolve(answer);
      }
    });
  });
}

/** Read a message of the type that an Any names. */
function unpack(any) {
  return definition[any.type_url.split("/").pop()].deserialize(any.value);
}

/** Return the reason in a google.rpc.Status. */
function reasonOf(bytes) {
  const details = bytes ? definition["google.rpc.Status"].deserialize(bytes).details : [];
  return details.map(unpack).map((detail) => detail.reason).find(Boolean) || "";
}

/** Follow a stream until a message satisfies; then end it. */
function follow(stream, satisfies) {
  return new Promise((resolve, reject) => {
    stream.on("data", (message) => {
      if (satisfies(message)) {
        resolve(message);
        stream.cancel();
      }
    });
    stream.on("error", reject); // after a cancellation of ours nobody listens any more
    stream.on("end", () => reject(new Error("the stream ended")));
  });
}

async function login(password, scope) {
  const answer = await call(tokens, "createToken", {
    password: { user_name: "admin", password },
    ...scope,
  });
  return bearer(answer.token);
}

function made(operation) {
  return unpack(operation.response).metadata.id;
}

/** Upload a disk of zeros as an image. */
async function upload(project) {
  const content = Buffer.alloc(1 << 20);
  const operation = await call(
    images,
    "createImage",
    { request_id: crypto.randomUUID(), name: "zeros", spec: { disk_format: "DISK_FORMAT_RAW" } },
    project,
  );
  const id = made(operation);
  const image = await new Promise((resolve, reject) => {
    const stream = images.uploadImageData(project, deadline(), (error, answer) =>
      error ? reject(error) : resolve(answer),
    );
    stream.write({ start: { id } });
    for (let at = 0; at < content.length; at += 1 << 18) {
      stream.write({ chunk: content.subarray(at, at + (1 << 18)) });
    }
    stream.write({ end: { sha256: crypto.createHash("sha256").update(content).digest("hex") } });
    stream.end();
  });
  return { id, state: image.status.state };
}

async function main() {
  const password = fs.readFileSync(0, "utf8").trim();
  const seen = {};
  const refused = await call(instances, "listInstances", {}).catch((error) => error);
  seen.without_token = { code: refused.code, reason: refused.reason };

  const [system, project] = [
    await login(password, { system: true }),
    await login(password, { project: "default" }),
  ];
  const flavor = made(
    await call(
      flavors,
      "createFlavor",
      {
        request_id: crypto.randomUUID(),
        name: "m1.node",
        spec: { vcpu_count: 1, memory_mib: 128, disk_gib: 1 },
      },
      system,
    ),
  );
  const image = await upload(project);
  seen.image_state = image.state;

  const { revision } = await call(instances, "listInstances", {}, project);
  const changes = [];
  const watch = instances.watchInstances({ from_revision: revision }, project, deadline());
  const failed = follow(watch, ({ type, instance }) => {
    if (type === "CHANGE_TYPE_BOOKMARK") return false;
    changes.push([type, instance.status ? instance.status.state : ""]);
    return instance.status && instance.status.state === "STATE_ERROR";
  });
  const request = {
    request_id: crypto.randomUUID(),
    name: "node_vm",
    labels: { made_by: "node" },
    spec: { flavor_id: flavor, image_id: image.id },
  };
  const operation = await call(instances, "createInstance", request, project);
  const repeated = await call(instances, "createInstance", request, project);
  seen.repeat_is_the_same = repeated.id === operation.id;
  const instance = (await failed).instance;
  seen.instance = {
    name: instance.metadata.name,
    hostname: instance.status.hostname,
    labels: instance.metadata.labels,
    fault: instance.status.fault.reason,
  };

  const ended = await call(
    operations, "waitOperation", { id: operation.id, timeout: { seconds: 60 } }, project,
  );
  seen.operation = {
    state: ended.state,
    reason: ended.error.details.map(unpack).map((detail) => detail.reason).find(Boolean),
    explanation: ended.error.details
      .filter((detail) => detail.type_url.endsWith("PlacementExplanation"))
      .map((detail) => unpack(detail).considered_count)[0],
    steps: ended.steps.map((step) => step.number),
  };

  const again = instances.watchInstances({ from_revision: revision }, project, deadline());
  const gone = follow(again, ({ type }) => type === "CHANGE_TYPE_DELETED");
  const deleting = await call(
    instances,
    "deleteInstance",
    { request_id: crypto.randomUUID(), id: instance.metadata.id },
    project,
  );
  seen.deleted_is_it = (await gone).instance.metadata.id === instance.metadata.id;
  const end = await call(
    operations, "waitOperation", { id: deleting.id, timeout: { seconds: 60 } }, project,
  );
  seen.delete_state = end.state;
  const left = await call(
    instances, "getInstance", { id: instance.metadata.id }, project,
  ).catch((error) => error);
  seen.after = { code: left.code, reason: left.reason };
  seen.changes = changes;
  process.stdout.write(JSON.stringify(seen) + "\n");
}

main().then(
  () => process.exit(0),
  (error) => {
    process.stderr.write(`${error.stack} ${error.reason || ""}\n`);
    process.exit(1);
  },
);
