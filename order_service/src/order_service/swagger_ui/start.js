// Starts Swagger UI on our document, with a fresh Idempotency-Key filled in.
"use strict";

// crypto.randomUUID is there on https and localhost only.
function uuid() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  bytes[6] = (bytes[6] & 0x0f) | 0x40;
  bytes[8] = (bytes[8] & 0x3f) | 0x80;
  const hex = Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
  return hex.replace(/^(.{8})(.{4})(.{4})(.{4})(.{12})$/, "$1-$2-$3-$4-$5");
}

function fillIn(spec) {
  for (const path of Object.values(spec.paths)) {
    for (const parameter of path.post?.parameters ?? []) {
      if (parameter.name === "Idempotency-Key") parameter.example = uuid();
    }
  }
  return spec;
}

async function start() {
  const response = await fetch("openapi.json");
  SwaggerUIBundle({
    spec: fillIn(await response.json()),
    dom_id: "#swagger-ui",
    deepLinking: true,
    displayRequestDuration: true,
    validatorUrl: null,
  });
}

start();
