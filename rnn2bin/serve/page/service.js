// The API, as this page uses it.

export class Problem extends Error {
  constructor(status, body) {
    super(body.detail || `the service answered ${status}`);
    this.status = status;
    this.reasons = body.reasons?.length ? body.reasons : [this.message];
    this.title = body.title || "That did not work";
  }
}

async function ask(method, path, body, headers = {}) {
  let answer;
  try {
    answer = await fetch(path, {
      method, headers: body === undefined ? headers : { "Content-Type": "application/json", ...headers },
      body: body === undefined ? undefined : JSON.stringify(body),
    });
  } catch {
    throw new Problem(0, { detail: "The service does not answer. It may be restarting; nothing is lost." });
  }
  const text = await answer.text();
  let found = {};
  try { found = text ? JSON.parse(text) : {}; } catch { /* not ours */ }
  if (!answer.ok) {
    if (answer.status === 401 && path !== "/v1/session") window.dispatchEvent(new Event("rnn2bin-key"));
    throw new Problem(answer.status, found);
  }
  return found;
}

export const service = {
  session: () => ask("GET", "/v1/session"),
  login: (key) => ask("POST", "/v1/session", { key }),
  logout: () => ask("DELETE", "/v1/session"),
  recipes: () => ask("GET", "/v1/recipes"),
  recipe: (name) => ask("GET", `/v1/recipes/${encodeURIComponent(name)}`),
  validate: (body) => ask("POST", "/v1/recipes/validate", body),
  convert: (body, key) => ask("POST", "/v1/conversions", body, { "Idempotency-Key": key }),
  list: (state, before) => ask("GET", `/v1/conversions?${new URLSearchParams({ limit: 50, ...(state && { state }), ...(before && { before }) })}`),
  report: (path) => ask("GET", path),
  get: (id) => ask("GET", `/v1/conversions/${encodeURIComponent(id)}`),
  cancel: (id) => ask("POST", `/v1/conversions/${id}/cancel`),
  retry: (id) => ask("POST", `/v1/conversions/${id}/retry`),
  remove: (id) => ask("DELETE", `/v1/conversions/${id}`),
  uploads: () => ask("GET", "/v1/uploads?limit=500"),
  forgetUpload: (id) => ask("DELETE", `/v1/uploads/${id}`),
};

export function upload(file, progress) {
  // fetch cannot tell how much has been sent.
  const request = new XMLHttpRequest();
  const done = new Promise((resolve, reject) => {
    request.open("PUT", `/v1/uploads?name=${encodeURIComponent(file.name.slice(-200))}`);
    request.upload.onprogress = (event) => event.lengthComputable && progress(event.loaded / event.total);
    request.onload = () => {
      let found = {};
      try { found = JSON.parse(request.responseText); } catch { /* not ours */ }
      request.status === 201 ? resolve(found) : reject(new Problem(request.status, found));
    };
    request.onerror = () => reject(new Problem(0, { detail: "The upload broke off; try again." }));
    request.onabort = () => reject(new Problem(0, { detail: "The upload was taken back." }));
    request.send(file);
  });
  return { done, stop: () => request.abort() };
}
