// Logs a person in by phone number, in a terminal, over gRPC. ../README.md has the flow.
import { randomUUID } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { createInterface } from 'node:readline';
import { setTimeout as sleep } from 'node:timers/promises';
import { promisify } from 'node:util';
import grpc from '@grpc/grpc-js';
import { loadSync } from '@grpc/proto-loader';

const { status } = grpc;
const signature = 'Acme', template_code = 'SMS_123456789'; // as approved by Aliyun
const serviceConfig = `{"loadBalancingConfig": [{"round_robin": {}}], "methodConfig": [{
  "name": [{"service": "phonenumberservice.PhoneNumberService"}], "waitForReady": true, "timeout": "15s"}]}`;

const proto = (file) => loadSync(new URL(file, import.meta.url).pathname, { keepCase: true });
const { phonenumberservice } = grpc.loadPackageDefinition(proto('../../phonenumberservice/phonenumberservice.proto'));
const google = proto('../error_details.proto');

const { PHONE_NUMBER_SERVICE: address, PHONE_NUMBER_SERVICE_CA: ca, PHONE_NUMBER_SERVICE_TOKEN: token } = process.env;
const client = new phonenumberservice.PhoneNumberService(
  address || 'localhost:50511',
  ca === undefined ? grpc.credentials.createInsecure() : grpc.credentials.createSsl(readFileSync(ca)),
  {
    'grpc.service_config': serviceConfig,
    'grpc.keepalive_time_ms': 10_000,
    'grpc.keepalive_timeout_ms': 5_000,
    'grpc.keepalive_permit_without_calls': 1,
  },
);
const methods = { SendSMS: promisify(client.SendSMS).bind(client), Valid: promisify(client.Valid).bind(client) };

/** Returns the detail of this kind in an error, or undefined. */
function detail(error, kind) {
  const [bytes] = error.metadata?.get('grpc-status-details-bin') ?? [];
  const { details = [] } = bytes ? google['google.rpc.Status'].deserialize(bytes) : {};
  const found = details.find((any) => any.type_url === `type.googleapis.com/google.rpc.${kind}`);
  return found && google[`google.rpc.${kind}`].deserialize(found.value);
}

/** Returns the seconds to wait before the next call, from the RetryInfo of an error. */
function wait(error) {
  const { retry_delay: delay } = detail(error, 'RetryInfo') ?? {};
  return delay ? Number(delay.seconds ?? 0) + (delay.nanos ?? 0) / 1e9 : 1;
}

/**
 * Repeats a call that certainly had no effect, or whose send is under way, up to twice. Returns the code,
 * and the response or the error. The code is UNKNOWN if the call may have had its effect, as after an
 * error without an ErrorInfo, which is not from the service.
 */
async function call(method, request, headers) {
  const metadata = grpc.Metadata.fromHttp2Headers(headers);
  metadata.setOptions({ waitForReady: true }); // grpc-js ignores that of the service config
  for (let tries = 1; ; tries++) {
    try {
      return [status.OK, await methods[method](request, metadata)];
    } catch (error) {
      const code = detail(error, 'ErrorInfo') ? error.code : status.UNKNOWN;
      const again = code === status.UNAVAILABLE || (code === status.ABORTED && wait(error) <= 1);
      if (!again || tries === 3) {
        return [[status.ABORTED, status.DEADLINE_EXCEEDED].includes(code) ? status.UNKNOWN : code, error];
      }
      console.error(error.details);
      await sleep(1000 * Math.max(1, wait(error)));
    }
  }
}

function say(text, result) {
  console.log(text);
  return result;
}

/** Tells if a code may arrive. */
async function send(phone_number, headers) {
  const key = { 'idempotency-key': randomUUID() }; // one for all tries
  const [code, error] = await call('SendSMS', { phone_number, signature, template_code }, { ...headers, ...key });
  if (code === status.OK) return say(`We sent a code to ${phone_number}.`, true);
  if (code === status.UNKNOWN) return say('The code may come late. Type it if it comes.', true);
  if (code === status.RESOURCE_EXHAUSTED && detail(error, 'RetryInfo')) {
    return say(`Too many codes. Try again in ${wait(error)} seconds.`, false);
  }
  if (detail(error, 'BadRequest')?.field_violations?.some(({ field }) => field === 'phone_number')) {
    return say(`${phone_number} is not a mobile number.`, false);
  }
  const { reason, metadata } = detail(error, 'ErrorInfo') ?? {};
  if (metadata?.refused === 'country') return say('We cannot send codes to this country or region.', false);
  if (['isv.BLACK_KEY_CONTROL_LIMIT', 'isv.CUSTOMER_REFUSED'].includes(reason)) {
    return say('This number does not accept our SMS; please use another one, or contact us.', false);
  }
  console.error(error.details); // for the operator
  return say('No code was sent. Try again later.', false);
}

/** Tells if the typed code is right. */
async function check(phone_number, typed, headers) {
  const [code, response] = await call('Valid', { phone_number, code: typed }, headers);
  if (code === status.OK) return response.valid ? say('Welcome.', true) : say('This code is not valid.', false);
  return say(code === status.UNKNOWN
    ? 'The check may have counted. Type the code again; if it fails, ask for another one.'
    : 'The code was not checked. Type it again.', false);
}

/** Tells if the person proved to hold the number. */
async function login(number) {
  const headers = { 'verification-context': randomUUID() }; // one for each login
  if (token) headers.authorization = `Bearer ${token}`;
  if (!(await send(number, headers))) return false;
  process.stdout.write('Code (empty for another one): ');
  for await (const line of createInterface({ input: process.stdin })) {
    if (line === '') await send(number, headers);
    else if (await check(number, line, headers)) return true;
    process.stdout.write('Code (empty for another one): ');
  }
  return false;
}

process.exit((await login(process.argv[2])) ? 0 : 1);
