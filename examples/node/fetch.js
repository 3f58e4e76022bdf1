// Logs a person in by phone number, in a terminal, with fetch and no package. ../README.md has the flow.
import { randomUUID } from 'node:crypto';
import { createInterface } from 'node:readline';
import { setTimeout as sleep } from 'node:timers/promises';

const signature = 'Acme', template_code = 'SMS_123456789'; // as approved by Aliyun
const { PHONE_NUMBER_SERVICE: address, PHONE_NUMBER_SERVICE_CA: ca, PHONE_NUMBER_SERVICE_TOKEN: token } = process.env;
// Node's fetch takes the CA from NODE_EXTRA_CA_CERTS, which must be set before the program starts.
const scheme = ca === undefined ? 'http' : 'https';
const url = `${scheme}://${address || 'localhost:50511'}/phonenumberservice.PhoneNumberService/`;

/** Returns the detail of this kind in an error, or undefined. */
const detail = (error, kind) => error.details?.find(({ type }) => type === `google.rpc.${kind}`)?.debug;

/** Returns the seconds to wait before the next call, from the RetryInfo of an error. */
const wait = (error) => parseFloat(detail(error, 'RetryInfo')?.retryDelay ?? '1s');

/** Makes a call. Returns the code, and the response or the error. */
async function post(method, request, headers) {
  try {
    const response = await fetch(url + method, {
      method: 'POST',
      headers: { ...headers, 'content-type': 'application/json' },
      body: JSON.stringify(request),
      signal: AbortSignal.timeout(15_000), // longer than a send can take
    });
    const body = await response.json();
    if (response.ok) return ['ok', body];
    return [detail(body, 'ErrorInfo') ? body.code : 'unknown', body]; // without an ErrorInfo it is not from the service
  } catch (error) {
    console.error(error.cause?.code ?? error.name);
    return [error.cause?.code === 'ECONNREFUSED' ? 'unavailable' : 'unknown', {}]; // no connection: nothing was sent
  }
}

/**
 * Repeats a call that certainly had no effect, or whose send is under way, up to twice. The code is
 * "unknown" if the call may have had its effect.
 */
async function call(method, request, headers) {
  for (let tries = 1; ; tries++) {
    const [code, body] = await post(method, request, headers);
    const again = code === 'unavailable' || (code === 'aborted' && wait(body) <= 1);
    if (!again || tries === 3) return [['aborted', 'deadline_exceeded'].includes(code) ? 'unknown' : code, body];
    await sleep(1000 * Math.max(1, wait(body)));
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
  if (code === 'ok') return say(`We sent a code to ${phone_number}.`, true);
  if (code === 'unknown') return say('The code may come late. Type it if it comes.', true);
  if (code === 'resource_exhausted' && detail(error, 'RetryInfo')) {
    return say(`Too many codes. Try again in ${wait(error)} seconds.`, false);
  }
  if (detail(error, 'BadRequest')?.fieldViolations.some(({ field }) => field === 'phone_number')) {
    return say(`${phone_number} is not a mobile number.`, false);
  }
  const { reason, metadata } = detail(error, 'ErrorInfo') ?? {};
  if (metadata?.refused === 'country') return say('We cannot send codes to this country or region.', false);
  if (['isv.BLACK_KEY_CONTROL_LIMIT', 'isv.CUSTOMER_REFUSED'].includes(reason)) {
    return say('This number does not accept our SMS; please use another one, or contact us.', false);
  }
  console.error(error.message); // for the operator
  return say('No code was sent. Try again later.', false);
}

/** Tells if the typed code is right. */
async function check(phone_number, typed, headers) {
  const [code, response] = await call('Valid', { phone_number, code: typed }, headers);
  if (code === 'ok') return response.valid ? say('Welcome.', true) : say('This code is not valid.', false);
  return say(code === 'unknown'
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
