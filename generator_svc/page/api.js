// Talks to the service that served this page. Every failure becomes a ServiceError in the services' wire form.

export class ServiceError extends Error {
  constructor({ message, code, status = null, param = null, requestId = null, retryable = false }) {
    super(message);
    Object.assign(this, { code, status, param, requestId, retryable });
  }
}

// What a person can do about a connection that failed, unless they ended it themselves.
function failure(error, message, code) {
  return error.name === "AbortError" ? error : new ServiceError({ message, code, retryable: true });
}

async function request(path, { body, apiKey, signal } = {}) {
  const headers = { Accept: body?.stream ? "text/event-stream" : "application/json" };
  if (body) headers["Content-Type"] = "application/json";
  if (apiKey) headers.Authorization = `Bearer ${apiKey}`;
  try {
    return await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    throw failure(error, "The service cannot be reached. Is it running?", "unreachable");
  }
}

const json = (response) => response.json().catch(() => null);

function serviceError(detail, response) {
  return new ServiceError({
    message: detail?.message ?? `The service answered with status ${response.status}.`,
    code: detail?.code ?? "http_error",
    status: response.ok ? null : response.status,
    param: detail?.param,
    requestId: detail?.request_id ?? response.headers.get("X-Request-ID"),
    retryable: detail?.retryable,
  });
}

// The events of an answer as they come, [name, data]: documents, token … and answer. Ends with an answer or a throw.
export async function* ask(body, apiKey, signal) {
  const response = await request("v1/answer", { body: { ...body, stream: true }, apiKey, signal });
  if (!response.ok) throw serviceError((await json(response))?.error, response);
  for await (const [name, data] of events(response)) {
    if (name === "error") throw serviceError(data.error, response);
    yield [name, data];
    if (name === "answer") return;
  }
  throw new ServiceError({ message: "The connection broke off before the answer was complete.", code: "unreachable", retryable: true });
}

// Server-sent events as the services write them: a line with the name, a line with JSON, an empty line.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      throw failure(error, "The connection broke off before the answer was complete.", "unreachable");
    }
    if (part.done) return;
    const blocks = (held + part.value).split("\n\n");
    held = blocks.pop();
    for (const block of blocks) {
      const fields = Object.fromEntries(block.split("\n").map((line) => [line.split(": ", 1)[0], line.slice(line.indexOf(": ") + 2)]));
      yield [fields.event, JSON.parse(fields.data)];
    }
  }
}

export async function info(apiKey) {
  const response = await request("info", { apiKey });
  const answer = await json(response);
  if (response.ok && answer) return answer;
  throw serviceError(answer?.error, response);
}

// {status, reasons}: /readyz says why in its body, whatever its status.
export async function readiness() {
  try {
    const answer = await json(await request("readyz"));
    return { status: answer?.status ?? "unavailable", reasons: answer?.reasons ?? [] };
  } catch (error) {
    return { status: "unreachable", reasons: [error.message] };
  }
}
