// Tests /openapi.json with the running service: the test gets every described response, each as
// described, and no other response.
import { Validator } from '@seriousme/openapi-schema-validator';
import { Ajv2020 } from 'ajv/dist/2020.js';
import addFormats from 'ajv-formats';
import { expect, test } from './service.js';

test.use({ settings: { PHONENUMBER_SMS_TIMEOUT: '1s' } });

// An in-memory store never fails, so these responses never occur.
const neverSeen = ['SendSMS 500', 'SendSMS 503', 'Valid 500', 'Valid 503'];

test('OpenAPI: every response is described, every description is seen', async ({ service }) => {
  const description = await (await fetch(service.url + '/openapi.json')).json();
  expect(await new Validator().validate(description)).toMatchObject({ valid: true });

  const ajv = addFormats(new Ajv2020({ strict: false, allErrors: true }));
  ajv.addSchema(description, 'openapi');
  const schemaErrors = (schema, value) => {
    const valid = ajv.compile(schema.$ref ? { $ref: 'openapi' + schema.$ref } : JSON.parse(JSON.stringify(schema).replaceAll('"#/', '"openapi#/')));
    return valid(value) ? [] : valid.errors;
  };

  const seen = new Set();
  // exchange makes a request, and checks request and response against the description.
  async function exchange(operation, status, { query = '', body, headers, fits = status !== 400 || operation === 'SendSMS' } = {}) {
    const [path, method, described] = Object.entries(description.paths)
      .flatMap(([path, methods]) => Object.entries(methods).map(([method, d]) => [path, method, d]))
      .find(([, , d]) => d.operationId === operation);
    const response = await fetch(service.url + path + query, { method: method.toUpperCase(), body: body && JSON.stringify(body), headers });
    const request = `${operation} ${query} ${JSON.stringify(body)}`;
    expect(response.status, request).toBe(status);
    seen.add(`${operation} ${status}`);
    if (body) {
      expect(schemaErrors(described.requestBody.content['application/json'].schema, body).length === 0, `${request} matches the schema`).toBe(fits);
    }
    if (fits) {
      for (const name of new URLSearchParams(query).keys()) expect(described.parameters.map(p => p.name), request).toContain(name);
    }
    const shared = described.responses[status]?.$ref?.split('/').at(-1);
    const expected = description.components.responses[shared] ?? described.responses[status];
    expect(expected, `${request}: ${status} is described`).toBeTruthy();
    if (!expected.content) return undefined;
    const [[type, { schema }]] = Object.entries(expected.content);
    expect(response.headers.get('content-type').split(';')[0], request).toBe(type);
    if (type === 'text/event-stream') return response.body;
    const value = type === 'application/json' ? await response.json() : await response.text();
    expect(schemaErrors(schema, value), `${request}: ${JSON.stringify(value)}`).toEqual([]);
    return value;
  }

  const events = await exchange('getEvents', 200);
  const number = { phone_number: '18600000000' };
  const send = { ...number, signature: 'Acme', template_code: 'SMS_1' };

  expect(await exchange('getInbox', 200)).toEqual([]);
  expect(await exchange('SendSMS', 200, { body: send })).toEqual({});
  const [message] = await exchange('getInbox', 200, { query: '?phone_number=+8618600000000&wait=5s' });
  expect(message).toMatchObject({ ...send, phone_number: '+8618600000000' });
  expect(await exchange('Valid', 200, { body: { ...number, code: 'x' } })).toEqual({ valid: false });
  expect(await exchange('Valid', 200, { body: { ...number, code: message.code } })).toEqual({ valid: true });

  await exchange('Valid', 400, { body: { phone_number: '10086' }, fits: true }); // the schema does not define a phone number
  await exchange('Valid', 400, { body: { phone: '18600000000' } });
  await exchange('Valid', 400, { body: { ...number, code: 123456 } });
  await exchange('SendSMS', 400, { body: { ...send, template_code: 'a b' }, fits: false });
  await exchange('SendSMS', 400, { body: { ...send, signature: 'a'.repeat(65) }, fits: false });
  await exchange('SendSMS', 400, { body: {}, fits: false });
  for (const operation of ['SendSMS', 'Valid']) {
    await exchange(operation, 415, { body: number, headers: { 'Content-Type': 'text/xml' } });
    await exchange(operation, 415, { body: number, headers: { Origin: 'http://evil.example' } });
  }

  const { enum: kinds } = description.components.schemas.Failure.properties.kind;
  for (const kind of kinds) {
    await exchange('putFailure', 200, { body: { kind, times: 1 } });
    const status = kind === 'none' ? 200 : kind.startsWith('limit') ? 429 : kind.startsWith('timeout') ? 504 : 400;
    const error = await exchange('SendSMS', status, { body: send });
    if (status === 429) expect(error.details[1].debug.retryDelay).toMatch(/^(60|3600|86400)s$/);
  }
  const other = { phone_number: '18600000001' };
  await exchange('putFailure', 200, { body: { kind: 'timeout', ...other } });
  expect(await exchange('getFailures', 200)).toEqual([{ phone_number: '+8618600000001', kind: 'timeout' }]);
  await Promise.all(Array.from({ length: 8 }, () => exchange('SendSMS', 504, { body: other })));
  await exchange('SendSMS', 409, { body: other });
  for (const body of [{}, { kind: 'x' }, { kind: 'timeout', times: -1 }, { kind: 'timeout', times: 1001 }, { kind: 'timeout', more: 1 }, { kind: 'timeout', times: '1' }]) {
    await exchange('putFailure', 400, { body });
  }
  await exchange('deleteFailures', 204, { query: '?phone_number=18600000001' });
  await exchange('deleteFailures', 204);

  expect(await exchange('getNumber', 200, { query: '?phone_number=186-0000-0000' })).toEqual({ phone_number: '+8618600000000' });
  expect(await exchange('getNumber', 200, { query: '?phone_number=10086' })).toHaveProperty('fault');
  for (const operation of ['getInbox', 'deleteInbox', 'getEvents', 'getFailures', 'deleteFailures', 'getNumber']) {
    await exchange(operation, 400, { query: '?unknown=1' });
  }
  await exchange('deleteInbox', 204, { query: '?phone_number=18600000000' });
  await exchange('deleteInbox', 204);

  // The events since the start, until the deletion.
  let text = '';
  let updates = 0;
  let wholes = 0;
  for await (const chunk of events.pipeThrough(new TextDecoderStream())) {
    const all = (text + chunk).split('\n\n');
    text = all.pop();
    for (const [, event, data] of all.map(e => e.match(/^(?:retry: 1000\n)?event: (.*)\ndata: (.*)$/))) {
      const value = JSON.parse(data);
      expect(schemaErrors({ $ref: `#/components/schemas/${event === 'settings' ? 'Settings' : 'Update'}` }, value), data).toEqual([]);
      updates += event === 'inbox';
      wholes += value.whole === true;
    }
    if (wholes > 1) break;
  }
  expect(updates).toBeGreaterThan(5);

  const described = Object.values(description.paths).flatMap(methods => Object.values(methods))
    .flatMap(d => Object.keys(d.responses).map(status => `${d.operationId} ${status}`));
  expect([...seen].sort()).toEqual(described.filter(d => !neverSeen.includes(d)).sort());
});
