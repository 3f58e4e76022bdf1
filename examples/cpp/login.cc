// Logs a person in by phone number, in a terminal. ../README.md has the flow.
#include <grpcpp/grpcpp.h>

#include <fstream>
#include <functional>
#include <iostream>
#include <random>
#include <thread>

#include "error_details.pb.h"
#include "phonenumberservice.grpc.pb.h"

using grpc::ClientContext, grpc::Status, grpc::StatusCode;
using phonenumberservice::PhoneNumberService;

const char kServiceConfig[] = R"({"loadBalancingConfig": [{"round_robin": {}}], "methodConfig": [{
  "name": [{"service": "phonenumberservice.PhoneNumberService"}], "waitForReady": true, "timeout": "15s"}]})";

std::string Env(const char* name, const char* otherwise = "") {
  const char* value = std::getenv(name);
  return value ? value : otherwise;
}

std::string RandomText() {
  std::random_device random;  // of 32 bits
  return std::to_string(random()) + "-" + std::to_string(random()) + "-" + std::to_string(random()) + "-" + std::to_string(random());
}

template <typename D>  // D is the type of a detail; it is empty if the error has none
D Detail(const Status& status) {
  google::rpc::Status details;
  details.ParseFromString(status.error_details());
  for (const auto& any : details.details())
    if (D detail; any.UnpackTo(&detail)) return detail;
  return {};
}

bool Say(const std::string& text, bool result) { return std::cout << text << "\n", result; }

struct Login {
  std::unique_ptr<PhoneNumberService::Stub> stub;
  std::string number, context = RandomText();  // one for each login

  // Send tells if a code may arrive.
  bool Send() {
    phonenumberservice::SendSMSRequest request;
    request.set_phone_number(number);
    request.set_signature("Acme");  // as approved by Aliyun, and so is the template
    request.set_template_code("SMS_123456789");
    phonenumberservice::Empty empty;
    auto [code, status] = Call([&, key = RandomText()](ClientContext* call) {  // one key for all tries
      call->AddMetadata("idempotency-key", key);
      return stub->SendSMS(call, request, &empty);
    });
    if (code == StatusCode::OK) return Say("We sent a code to " + number + ".", true);
    if (code == StatusCode::UNKNOWN) return Say("The code may come late. Type it if it comes.", true);
    if (auto wait = Detail<google::rpc::RetryInfo>(status).retry_delay().seconds(); wait > 0 && code == StatusCode::RESOURCE_EXHAUSTED)
      return Say("Too many codes. Try again in " + std::to_string(wait) + " seconds.", false);
    auto invalid = Detail<google::rpc::BadRequest>(status);
    for (const auto& violation : invalid.field_violations())
      if (violation.field() == "phone_number") return Say(number + " is not a mobile number.", false);
    auto info = Detail<google::rpc::ErrorInfo>(status);
    if ((*info.mutable_metadata())["refused"] == "country") return Say("We cannot send codes to this country or region.", false);
    if (info.reason() == "isv.BLACK_KEY_CONTROL_LIMIT" || info.reason() == "isv.CUSTOMER_REFUSED")
      return Say("This number does not accept our SMS; please use another one, or contact us.", false);
    std::cerr << status.error_message() << "\n";  // for the operator
    return Say("No code was sent. Try again later.", false);
  }

  // Check tells if the typed code is right.
  bool Check(const std::string& typed) {
    phonenumberservice::ValidRequest request;
    request.set_phone_number(number);
    request.set_code(typed);
    phonenumberservice::ValidResponse response;
    auto code = Call([&](ClientContext* call) { return stub->Valid(call, request, &response); }).first;
    if (code == StatusCode::OK) return Say(response.valid() ? "Welcome." : "This code is not valid.", response.valid());
    if (code == StatusCode::UNKNOWN) return Say("The check may have counted. Type the code again; if it fails, ask for another one.", false);
    return Say("The code was not checked. Type it again.", false);
  }

  // Call repeats a call that certainly had no effect, or whose send is under way, up to twice. The code is
  // UNKNOWN if the call may have had its effect. An error without an ErrorInfo is not from the service.
  std::pair<StatusCode, Status> Call(const std::function<Status(ClientContext*)>& method) {
    for (int tries = 1;; tries++) {
      ClientContext call;
      call.AddMetadata("verification-context", context);
      if (auto token = Env("PHONE_NUMBER_SERVICE_TOKEN"); !token.empty()) call.AddMetadata("authorization", "Bearer " + token);
      Status status = method(&call);
      bool own = status.ok() || !Detail<google::rpc::ErrorInfo>(status).reason().empty();
      StatusCode code = own ? status.error_code() : StatusCode::UNKNOWN;
      auto wait = Detail<google::rpc::RetryInfo>(status).retry_delay().seconds();
      bool again = code == StatusCode::UNAVAILABLE || (code == StatusCode::ABORTED && wait <= 1);
      if (!again || tries == 3)
        return {code == StatusCode::ABORTED || code == StatusCode::DEADLINE_EXCEEDED ? StatusCode::UNKNOWN : code, status};
      std::this_thread::sleep_for(std::chrono::seconds(wait > 1 ? wait : 1));
    }
  }
};

int main(int, char** argv) {
  grpc::ChannelArguments settings;
  settings.SetServiceConfigJSON(kServiceConfig);
  settings.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, 10000);
  settings.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 5000);
  settings.SetInt(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  settings.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  auto security = grpc::InsecureChannelCredentials();
  if (const char* ca = std::getenv("PHONE_NUMBER_SERVICE_CA")) {
    const std::string pem(std::istreambuf_iterator<char>(std::ifstream(ca).rdbuf()), {});
    if (pem.empty()) return std::cerr << "failed to read PHONE_NUMBER_SERVICE_CA: " << ca << "\n", 1;
    security = grpc::SslCredentials({pem, "", ""});
  }
  const std::string address = Env("PHONE_NUMBER_SERVICE", "localhost:50511");
  Login login{PhoneNumberService::NewStub(grpc::CreateCustomChannel(address, security, settings)), argv[1]};
  if (!login.Send()) return 1;
  for (std::string line; std::cout << "Code (empty for another one): " << std::flush && std::getline(std::cin, line);)
    if (line.empty() ? login.Send(), false : login.Check(line)) return 0;
  return 1;
}
