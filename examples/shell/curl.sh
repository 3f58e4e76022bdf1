#!/bin/sh
# Logs a person in by phone number, in a terminal, with curl and jq. ../README.md has the flow.
set -u
number=$1
context=$(head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \n') # one for each login
url="http://${PHONE_NUMBER_SERVICE:-localhost:50511}/phonenumberservice.PhoneNumberService"
if [ -n "${PHONE_NUMBER_SERVICE_CA+set}" ]; then
  [ -r "$PHONE_NUMBER_SERVICE_CA" ] || { echo "failed to read PHONE_NUMBER_SERVICE_CA: $PHONE_NUMBER_SERVICE_CA" >&2 && exit 1; }
  url="https${url#http}"
fi

# call METHOD JSON [HEADER] sets body, and code to "ok", an error code of the service, or "unknown" if
# the call may have had its effect, as after an error without an ErrorInfo, which is not from the service.
# It repeats a call that certainly had no effect, or whose send is under way, up to twice.
call() {
  for try in 1 2 3; do
    body=$(printf '%s\n' 'Content-Type: application/json' "Verification-Context: $context" ${3:+"$3"} \
      ${PHONE_NUMBER_SERVICE_TOKEN:+"Authorization: Bearer $PHONE_NUMBER_SERVICE_TOKEN"} |
      curl -s --fail-with-body -H @- --max-time 15 ${PHONE_NUMBER_SERVICE_CA+--cacert "$PHONE_NUMBER_SERVICE_CA"} -d "$2" "$url/$1")
    status=$?
    case $status/$(detail ErrorInfo .reason) in
    0/) printf %s "$body" | jq -e . >/dev/null 2>&1 && code=ok || code=unknown ;;
    22/?*) code=$(printf %s "$body" | jq -r .code) ;; # an HTTP error with an ErrorInfo
    7/*) code=unavailable ;; # no connection: nothing was sent
    *) code=unknown ;;
    esac
    case $try/$code/$(wait_for 1) in
    [12]/unavailable/* | [12]/aborted/[01] | [12]/aborted/0.*) sleep "$(wait_for 1)" ;;
    */aborted/* | */deadline_exceeded/*) code=unknown && return 0 ;;
    *) return 0 ;;
    esac
  done
}

# detail KIND FILTER prints a part of the detail of this kind in an error.
detail() {
  printf %s "$body" | jq -r ".details[]? | select(.type == \"google.rpc.$1\") | .debug | $2" 2>/dev/null
}

# wait_for DEFAULT prints the seconds to wait before the next call, from the RetryInfo of an error.
wait_for() {
  detail RetryInfo .retryDelay | tr -d s | grep . || echo "$1"
}

send() { # succeeds if a code may arrive
  key=$(head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \n') # one for all tries
  call SendSMS "$(jq -n --arg n "$number" '{phone_number: $n, signature: "Acme", template_code: "SMS_123456789"}')" "Idempotency-Key: $key"
  case $code/$(wait_for 0)/$(detail BadRequest '.fieldViolations[].field')/$(detail ErrorInfo '.metadata.refused, .reason') in
  ok/*) echo "We sent a code to $number." && return 0 ;;
  unknown/*) echo "The code may come late. Type it if it comes." && return 0 ;;
  resource_exhausted/[1-9]*) echo "Too many codes. Try again in $(wait_for 60) seconds." ;;
  */*phone_number*/*) echo "$number is not a mobile number." ;;
  */country*) echo "We cannot send codes to this country or region." ;;
  *isv.BLACK_KEY_CONTROL_LIMIT | *isv.CUSTOMER_REFUSED) echo "This number does not accept our SMS; please use another one, or contact us." ;;
  *) echo "No code was sent. Try again later." && printf '%s\n' "$body" >&2 ;; # for the operator
  esac
  return 1
}

check() { # succeeds if the typed code is right
  call Valid "$(jq -n --arg n "$number" --arg c "$1" '{phone_number: $n, code: $c}')"
  case $code/$(printf %s "$body" | jq -r .valid) in
  ok/true) echo "Welcome." && return 0 ;;
  ok/*) echo "This code is not valid." ;;
  unknown/*) echo "The check may have counted. Type the code again; if it fails, ask for another one." ;;
  *) echo "The code was not checked. Type it again." ;;
  esac
  return 1
}

send || exit 1
while printf 'Code (empty for another one): ' && read -r typed; do
  if [ -z "$typed" ]; then
    send
  elif check "$typed"; then
    exit 0
  fi
done
exit 1
