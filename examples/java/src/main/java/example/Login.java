package example;

import com.google.gson.Gson;
import com.google.protobuf.Any;
import com.google.protobuf.InvalidProtocolBufferException;
import com.google.protobuf.Message;
import com.google.rpc.*;
import io.github.liulinhuai.phonenumberservice.*;
import io.github.liulinhuai.phonenumberservice.PhoneNumberServiceGrpc.PhoneNumberServiceBlockingStub;
import io.grpc.*;
import io.grpc.Status.Code;
import io.grpc.protobuf.StatusProto;
import io.grpc.stub.MetadataUtils;
import java.util.*;
import java.util.concurrent.TimeUnit;
import java.util.function.Supplier;

/** Logs a person in by phone number, in a terminal. ../README.md has the flow. */
record Login(PhoneNumberServiceBlockingStub stub, String number) {
  private record Outcome<R>(Code code, R response, StatusRuntimeException error) {}
  private static final String SIGN_NAME = "Acme", TEMPLATE_CODE = "SMS_123456789"; // as approved by Aliyun
  private static final Set<Code> LATE = Set.of(Code.ABORTED, Code.DEADLINE_EXCEEDED);
  private static final Set<String> REFUSALS = Set.of("isv.BLACK_KEY_CONTROL_LIMIT", "isv.CUSTOMER_REFUSED");
  private static final String SERVICE_CONFIG = """
      {"loadBalancingConfig": [{"round_robin": {}}], "methodConfig": [{
        "name": [{"service": "phonenumberservice.PhoneNumberService"}], "waitForReady": true, "timeout": "15s"}]}""";

  public static void main(String[] args) throws Exception {
    Map<String, String> env = System.getenv();
    String address = env.getOrDefault("PHONE_NUMBER_SERVICE", "localhost:50511"), ca = env.get("PHONE_NUMBER_SERVICE_CA");
    var security = ca == null ? InsecureChannelCredentials.create() : TlsChannelCredentials.newBuilder().trustManager(new java.io.File(ca)).build();
    var channel = Grpc.newChannelBuilder(address, security).defaultServiceConfig(new Gson().fromJson(SERVICE_CONFIG, Map.class))
        .keepAliveTime(10, TimeUnit.SECONDS).keepAliveTimeout(5, TimeUnit.SECONDS).keepAliveWithoutCalls(true).build();
    var stub = with(PhoneNumberServiceGrpc.newBlockingStub(channel), "verification-context", UUID.randomUUID().toString()); // one for each login
    String token = env.get("PHONE_NUMBER_SERVICE_TOKEN");
    if (token != null) stub = with(stub, "authorization", "Bearer " + token);
    System.exit(new Login(stub, args[0]).run() ? 0 : 1);
  }

  private static PhoneNumberServiceBlockingStub with(PhoneNumberServiceBlockingStub stub, String name, String value) {
    Metadata headers = new Metadata();
    headers.put(Metadata.Key.of(name, Metadata.ASCII_STRING_MARSHALLER), value);
    return stub.withInterceptors(MetadataUtils.newAttachHeadersInterceptor(headers));
  }

  private boolean run() throws InterruptedException {
    if (!send()) return false;
    System.out.print("Code (empty for another one): ");
    for (Scanner in = new Scanner(System.in); in.hasNextLine(); System.out.print("Code (empty for another one): ")) {
      String line = in.nextLine();
      if (line.isEmpty()) send();
      else if (check(line)) return true;
    }
    return false;
  }

  // Tells if a code may arrive.
  private boolean send() throws InterruptedException {
    var stub = with(this.stub, "idempotency-key", UUID.randomUUID().toString()); // one for all tries
    var request = SendSMSRequest.newBuilder().setPhoneNumber(number).setSignature(SIGN_NAME).setTemplateCode(TEMPLATE_CODE).build();
    var outcome = call(() -> stub.sendSMS(request));
    System.out.println(text(outcome.code, outcome.error));
    return outcome.code == Code.OK || outcome.code == Code.UNKNOWN;
  }

  // Returns the text for the person after a send.
  private String text(Code code, StatusRuntimeException error) {
    if (code == Code.OK) return "We sent a code to " + number + ".";
    if (code == Code.UNKNOWN) return "The code may come late. Type it if it comes.";
    if (code == Code.RESOURCE_EXHAUSTED && wait(error) > 0) return "Too many codes. Try again in " + wait(error) + " seconds.";
    var violations = detail(error, BadRequest.class).map(BadRequest::getFieldViolationsList).orElse(List.of());
    if (violations.stream().anyMatch(v -> v.getField().equals("phone_number"))) return number + " is not a mobile number.";
    var info = detail(error, ErrorInfo.class).orElseThrow();
    if ("country".equals(info.getMetadataMap().get("refused"))) return "We cannot send codes to this country or region.";
    if (REFUSALS.contains(info.getReason())) return "This number does not accept our SMS; please use another one, or contact us.";
    System.err.println(error.getMessage()); // for the operator
    return "No code was sent. Try again later.";
  }

  // Tells if the typed code is right.
  private boolean check(String typed) throws InterruptedException {
    var outcome = call(() -> stub.valid(ValidRequest.newBuilder().setPhoneNumber(number).setCode(typed).build()));
    boolean valid = outcome.code == Code.OK && outcome.response.getValid();
    System.out.println(switch (outcome.code) {
      case OK -> valid ? "Welcome." : "This code is not valid.";
      case UNKNOWN -> "The check may have counted. Type the code again; if it fails, ask for another one.";
      default -> "The code was not checked. Type it again.";
    });
    return valid;
  }

  // Repeats a call that certainly had no effect, or whose send is under way, up to twice. The code is UNKNOWN
  // if the call may have had its effect. An error without an ErrorInfo is not from the service.
  private static <R> Outcome<R> call(Supplier<R> method) throws InterruptedException {
    for (int tries = 1; ; tries++) {
      try {
        return new Outcome<>(Code.OK, method.get(), null);
      } catch (StatusRuntimeException e) {
        Code code = detail(e, ErrorInfo.class).isPresent() ? e.getStatus().getCode() : Code.UNKNOWN;
        boolean again = code == Code.UNAVAILABLE || code == Code.ABORTED && wait(e) <= 1;
        if (!again || tries == 3) return new Outcome<>(LATE.contains(code) ? Code.UNKNOWN : code, null, e);
        TimeUnit.SECONDS.sleep(Math.max(1, wait(e)));
      }
    }
  }

  // Returns the seconds to wait before the next call, from the RetryInfo of an error, or 0.
  private static long wait(StatusRuntimeException e) {
    return detail(e, RetryInfo.class).map(retry -> retry.getRetryDelay().getSeconds()).orElse(0L);
  }

  private static <D extends Message> Optional<D> detail(StatusRuntimeException e, Class<D> kind) {
    try {
      for (Any any : StatusProto.fromThrowable(e).getDetailsList()) if (any.is(kind)) return Optional.of(any.unpack(kind));
    } catch (InvalidProtocolBufferException invalid) {
      System.err.println(invalid.getMessage());
    }
    return Optional.empty();
  }
}
