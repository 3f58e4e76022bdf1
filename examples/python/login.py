"""Logs a person in by phone number, in a terminal. ../README.md has the flow."""

import math
import os
import sys
import time
import uuid

import grpc
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from grpc import StatusCode
from grpc_status import rpc_status

import phonenumberservice_pb2 as pb
import phonenumberservice_pb2_grpc as pb_grpc

SIGN_NAME, TEMPLATE_CODE = "Acme", "SMS_123456789"  # as approved by Aliyun
SERVICE_CONFIG = """{"loadBalancingConfig": [{"round_robin": {}}], "methodConfig": [{
  "name": [{"service": "phonenumberservice.PhoneNumberService"}], "waitForReady": true, "timeout": "15s"}]}"""
OPTIONS = [
    ("grpc.service_config", SERVICE_CONFIG),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]


def detail(error, kind):
    """Returns the detail of this kind in an error, or an empty one."""
    status = rpc_status.from_call(error)
    for packed in status.details if status else ():
        found = kind()
        if packed.Unpack(found):
            return found
    return kind()


def wait(error):
    """Returns the seconds to wait before the next call, from the RetryInfo of an error, or 0."""
    return detail(error, RetryInfo).retry_delay.ToTimedelta().total_seconds()


def call(method, request, metadata):
    """Repeats a call that had no effect, or whose send is under way, up to twice. UNKNOWN: it may have had an effect."""
    for attempt in range(3):
        if attempt:
            print(failure.details(), file=sys.stderr)
            time.sleep(max(1, wait(failure)))
        try:
            return method(request, metadata=metadata), StatusCode.OK, None
        except grpc.RpcError as error:
            failure = error
        # An error without an ErrorInfo is not from the service.
        code = failure.code() if detail(failure, ErrorInfo).reason else StatusCode.UNKNOWN
        if code != StatusCode.UNAVAILABLE and (code != StatusCode.ABORTED or wait(failure) > 1):
            break
    return None, StatusCode.UNKNOWN if code in (StatusCode.ABORTED, StatusCode.DEADLINE_EXCEEDED) else code, failure


def send(stub, number, metadata):
    """Tells if a code may arrive."""
    request = pb.SendSMSRequest(phone_number=number, signature=SIGN_NAME, template_code=TEMPLATE_CODE)
    key = ("idempotency-key", str(uuid.uuid4()))  # one for all attempts
    _, code, error = call(stub.SendSMS, request, [*metadata, key])
    if code == StatusCode.OK:
        print(f"We sent a code to {number}.")
    elif code == StatusCode.UNKNOWN:
        print("The code may come late. Type it if it comes.")
    elif code == StatusCode.RESOURCE_EXHAUSTED and wait(error):
        print(f"Too many codes. Try again in {math.ceil(wait(error))} seconds.")
    elif any(violation.field == "phone_number" for violation in detail(error, BadRequest).field_violations):
        print(f"{number} is not a mobile number.")
    elif detail(error, ErrorInfo).metadata.get("refused") == "country":
        print("We cannot send codes to this country or region.")
    elif detail(error, ErrorInfo).reason in ("isv.BLACK_KEY_CONTROL_LIMIT", "isv.CUSTOMER_REFUSED"):
        print("This number does not accept our SMS; please use another one, or contact us.")
    else:
        print("No code was sent. Try again later.")
        print(error.details(), file=sys.stderr)  # for the operator
    return code in (StatusCode.OK, StatusCode.UNKNOWN)


def check(stub, number, typed, metadata):
    """Tells if the typed code is right."""
    response, code, _ = call(stub.Valid, pb.ValidRequest(phone_number=number, code=typed), metadata)
    if code == StatusCode.OK:
        print("Welcome." if response.valid else "This code is not valid.")
    elif code == StatusCode.UNKNOWN:
        print("The check may have counted. Type the code again; if it fails, ask for another one.")
    else:
        print("The code was not checked. Type it again.")
    return code == StatusCode.OK and response.valid


def login(stub, number):
    """Tells if the person proved to hold the number."""
    metadata = [("verification-context", str(uuid.uuid4()))]  # one for each login
    if token := os.environ.get("PHONE_NUMBER_SERVICE_TOKEN"):
        metadata.append(("authorization", f"Bearer {token}"))
    if not send(stub, number, metadata):
        return False
    while True:
        print("Code (empty for another one): ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return False
        if line == "\n":
            send(stub, number, metadata)
        elif check(stub, number, line.strip(), metadata):
            return True


target = os.environ.get("PHONE_NUMBER_SERVICE", "localhost:50511")
if "PHONE_NUMBER_SERVICE_CA" in os.environ:
    with open(os.environ["PHONE_NUMBER_SERVICE_CA"], "rb") as file:
        channel = grpc.secure_channel(target, grpc.ssl_channel_credentials(file.read()), OPTIONS)
else:
    channel = grpc.insecure_channel(target, OPTIONS)
sys.exit(0 if login(pb_grpc.PhoneNumberServiceStub(channel), sys.argv[1]) else 1)
