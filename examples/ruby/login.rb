# frozen_string_literal: true

# Logs a person in by phone number, in a terminal. ../README.md has the flow.
require 'google/protobuf/well_known_types'
require 'google/rpc/error_details_pb'
require 'grpc'
require 'securerandom'
require_relative 'phonenumberservice_services_pb'

SIGN_NAME, TEMPLATE_CODE = %w[Acme SMS_123456789].freeze # as approved by Aliyun
REFUSALS = %w[isv.BLACK_KEY_CONTROL_LIMIT isv.CUSTOMER_REFUSED].freeze # the person or the carrier wants no SMS
SERVICE_CONFIG = <<~JSON
  {"loadBalancingConfig": [{"round_robin": {}}], "methodConfig": [{
    "name": [{"service": "phonenumberservice.PhoneNumberService"}], "waitForReady": true, "timeout": "15s"}]}
JSON
CHANNEL_ARGS = {
  'grpc.service_config' => SERVICE_CONFIG,
  'grpc.keepalive_time_ms' => 10_000,
  'grpc.keepalive_timeout_ms' => 5_000,
  'grpc.keepalive_permit_without_calls' => 1,
  'grpc.http2.max_pings_without_data' => 0
}.freeze

# One person logs in.
class Login
  include GRPC::Core::StatusCodes
  include Liulinhuai::PhoneNumbers

  def initialize(stub, number)
    @stub = stub
    @number = number
    @metadata = { 'verification-context' => SecureRandom.uuid } # one for each login
    token = ENV.fetch('PHONE_NUMBER_SERVICE_TOKEN', nil)
    @metadata['authorization'] = "Bearer #{token}" if token
  end

  # Tells if the person proved to hold the number.
  def run
    return false unless send_code

    print 'Code (empty for another one): '
    while (line = $stdin.gets&.chomp)
      if line.empty?
        send_code
      elsif check(line)
        return true
      end
      print 'Code (empty for another one): '
    end
    false
  end

  private

  # Tells if a code may arrive.
  def send_code
    request = SendSMSRequest.new(phone_number: @number, signature: SIGN_NAME, template_code: TEMPLATE_CODE)
    metadata = @metadata.merge('idempotency-key' => SecureRandom.uuid) # one for all tries
    code, error = call { @stub.send_sms(request, metadata: metadata) }
    puts text(code, error)
    [OK, UNKNOWN].include?(code)
  end

  # Returns the text for the person after a send.
  def text(code, error)
    return "We sent a code to #{@number}." if code == OK
    return 'The code may come late. Type it if it comes.' if code == UNKNOWN
    return "Too many codes. Try again in #{wait(error).ceil} seconds." if code == RESOURCE_EXHAUSTED && wait(error) > 0

    violations = detail(error, Google::Rpc::BadRequest)&.field_violations.to_a
    return "#{@number} is not a mobile number." if violations.any? { |violation| violation.field == 'phone_number' }

    info = detail(error, Google::Rpc::ErrorInfo)
    return 'We cannot send codes to this country or region.' if info.metadata['refused'] == 'country'
    return 'This number does not accept our SMS; please use another one, or contact us.' if REFUSALS.include?(info.reason)

    warn error.details # for the operator
    'No code was sent. Try again later.'
  end

  # Tells if the typed code is right.
  def check(typed)
    code, response = call { @stub.valid(ValidRequest.new(phone_number: @number, code: typed), metadata: @metadata) }
    case code
    when OK then puts response.valid ? 'Welcome.' : 'This code is not valid.'
    when UNKNOWN then puts 'The check may have counted. Type the code again; if it fails, ask for another one.'
    else puts 'The code was not checked. Type it again.'
    end
    code == OK && response.valid
  end

  # Repeats a call that certainly had no effect, or whose send is under way, up to twice. Returns the
  # code, and the response or the error. The code is UNKNOWN if the call may have had its effect.
  def call
    tries ||= 1
    [OK, yield]
  rescue GRPC::BadStatus => e
    code = detail(e, Google::Rpc::ErrorInfo) ? e.code : UNKNOWN # without one it is not from the service
    again = code == UNAVAILABLE || (code == ABORTED && wait(e) <= 1)
    return [[ABORTED, DEADLINE_EXCEEDED].include?(code) ? UNKNOWN : code, e] if !again || tries == 3

    warn e.details
    sleep [1, wait(e)].max
    tries += 1
    retry
  end

  # Returns the seconds to wait before the next call, from the RetryInfo of an error, or 0.
  def wait(error) = detail(error, Google::Rpc::RetryInfo)&.retry_delay.to_f

  # Returns the detail of this kind in an error, or nil.
  def detail(error, kind) = error.to_rpc_status&.details&.find { |packed| packed.is(kind) }&.unpack(kind)
end

$stdout.sync = true
ca = ENV.fetch('PHONE_NUMBER_SERVICE_CA', nil)
credentials = ca ? GRPC::Core::ChannelCredentials.new(File.read(ca)) : :this_channel_is_insecure
address = ENV.fetch('PHONE_NUMBER_SERVICE', 'localhost:50511')
stub = Liulinhuai::PhoneNumbers::PhoneNumberService::Stub.new(address, credentials, channel_args: CHANNEL_ARGS)
exit Login.new(stub, ARGV.fetch(0)).run
