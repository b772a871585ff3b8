// Talks to the service that served this page. Every failure becomes a ServiceError in the services' wire form.

export class ServiceError extends Error {
  constructor({ message, code, status = null, param = null, requestId = null, retryable = false }) {
    super(message);
    Object.assign(this, { code, status, param, requestId, retryable });
  }
}

async function request(path, { body, apiKey, signal } = {}) {
  const headers = { Accept: "application/json" };
  if (body) headers["Content-Type"] = "application/json";
  if (apiKey) headers.Authorization = `Bearer ${apiKey}`;
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServiceError({ message: "The service cannot be reached. Is it running?", code: "unreachable", retryable: true });
  }
  const answer = await response.json().catch(() => null);
  return { response, answer };
}

async function call(path, options) {
  const { response, answer } = await request(path, options);
  if (response.ok && answer) return answer;
  const detail = answer?.error ?? {};
  throw new ServiceError({
    message: detail.message ?? `The service answered with status ${response.status}.`,
    code: detail.code ?? "http_error",
    status: response.status,
    param: detail.param,
    requestId: detail.request_id ?? response.headers.get("X-Request-ID"),
    retryable: detail.retryable,
  });
}

export const ask = (body, apiKey, signal) => call("v1/answer", { body, apiKey, signal });
export const info = (apiKey) => call("info", { apiKey });

// {status, reasons}: /readyz says why in its body, whatever its status.
export async function readiness() {
  try {
    const { answer } = await request("readyz");
    return { status: answer?.status ?? "unavailable", reasons: answer?.reasons ?? [] };
  } catch (error) {
    return { status: "unreachable", reasons: [error.message] };
  }
}
