<?php
// Logs a person in by phone number, in a terminal. ../README.md has the flow.
declare(strict_types=1);

const SIGN_NAME = 'Acme', TEMPLATE_CODE = 'SMS_123456789'; // as approved by Aliyun
const REFUSALS = ['isv.BLACK_KEY_CONTROL_LIMIT', 'isv.CUSTOMER_REFUSED'];

/** Returns the detail of this kind in an error, or an empty array. */
function detail(array $error, string $kind): array
{
    $found = array_filter((array) ($error['details'] ?? []), fn($detail) => ($detail['type'] ?? '') === "google.rpc.$kind");
    return current($found)['debug'] ?? [];
}

/** Returns the seconds to wait before the next call, from the RetryInfo of an error, or 0. */
function wait(array $error): float
{
    return (float) (detail($error, 'RetryInfo')['retryDelay'] ?? 0); // "60s"
}

final class PhoneNumberService
{
    public function __construct(private string $url, private ?string $ca, private array $headers) {}

    /**
     * Makes a call, and repeats it up to twice if it certainly had no effect, or its send is under way.
     * The code is "ok", an error code of the service, or "unknown" if the call may have had its effect.
     * @return array{string, array} the code, and the response or the error
     */
    public function call(string $method, array $request, string ...$headers): array
    {
        for ($tries = 1; ; $tries++) {
            [$code, $body] = $this->post($method, $request, [...$this->headers, ...$headers]);
            $again = $code === 'unavailable' || ($code === 'aborted' && wait($body) <= 1);
            if (!$again || $tries === 3) {
                return [in_array($code, ['aborted', 'deadline_exceeded'], true) ? 'unknown' : $code, $body];
            }
            sleep((int) max(1, wait($body)));
        }
    }

    private function post(string $method, array $request, array $headers): array
    {
        $curl = curl_init($this->url . $method);
        curl_setopt_array($curl, [
            CURLOPT_POSTFIELDS => json_encode($request, JSON_THROW_ON_ERROR),
            CURLOPT_HTTPHEADER => ['Content-Type: application/json', ...$headers],
            CURLOPT_RETURNTRANSFER => true,
            CURLOPT_TIMEOUT => 15, // longer than a send can take
            CURLOPT_FORBID_REUSE => true, // libcurl repeats a POST if a reused connection breaks
            CURLOPT_CAINFO => $this->ca,
        ]);
        $text = curl_exec($curl);
        $body = is_string($text) ? json_decode($text, true) : null;
        return match (true) {
            curl_errno($curl) === CURLE_COULDNT_CONNECT => ['unavailable', []], // nothing was sent
            !is_array($body) => ['unknown', []], // the connection broke, the time was up, or a proxy replied
            curl_getinfo($curl, CURLINFO_RESPONSE_CODE) === 200 => ['ok', $body],
            detail($body, 'ErrorInfo') === [] => ['unknown', $body], // it is not from the service
            default => [$body['code'], $body],
        };
    }
}

final class Login
{
    public function __construct(private PhoneNumberService $service, private string $number) {}

    public function send(): bool // if a code may arrive
    {
        $request = ['phone_number' => $this->number, 'signature' => SIGN_NAME, 'template_code' => TEMPLATE_CODE];
        $key = bin2hex(random_bytes(16)); // one for all tries
        [$code, $body] = $this->service->call('SendSMS', $request, "Idempotency-Key: $key");
        $info = detail($body, 'ErrorInfo');
        $invalid = array_column(detail($body, 'BadRequest')['fieldViolations'] ?? [], 'field');
        echo match (true) {
            $code === 'ok' => "We sent a code to $this->number.\n",
            $code === 'unknown' => "The code may come late. Type it if it comes.\n",
            $code === 'resource_exhausted' && wait($body) > 0 => 'Too many codes. Try again in ' . wait($body) . " seconds.\n",
            in_array('phone_number', $invalid, true) => "$this->number is not a mobile number.\n",
            ($info['metadata']['refused'] ?? '') === 'country' => "We cannot send codes to this country or region.\n",
            in_array($info['reason'] ?? '', REFUSALS, true) => "This number does not accept our SMS; please use another one, or contact us.\n",
            default => "No code was sent. Try again later.\n",
        };
        $code === 'ok' || error_log("SendSMS: $code: " . ($body['message'] ?? '')); // for the operator
        return in_array($code, ['ok', 'unknown'], true);
    }

    /** Tells if the typed code is right. */
    public function check(string $typed): bool
    {
        [$code, $body] = $this->service->call('Valid', ['phone_number' => $this->number, 'code' => $typed]);
        $valid = $code === 'ok' && ($body['valid'] ?? false);
        echo match ($code) {
            'ok' => $valid ? "Welcome.\n" : "This code is not valid.\n",
            'unknown' => "The check may have counted. Type the code again; if it fails, ask for another one.\n",
            default => "The code was not checked. Type it again.\n",
        };
        return $valid;
    }
}

$headers = ['Verification-Context: ' . bin2hex(random_bytes(16))]; // one for each login
if (($token = getenv('PHONE_NUMBER_SERVICE_TOKEN')) !== false) {
    $headers[] = "Authorization: Bearer $token";
}
$ca = getenv('PHONE_NUMBER_SERVICE_CA'); // false if it is not set
$ca === false || is_readable($ca) || (fwrite(STDERR, "failed to read PHONE_NUMBER_SERVICE_CA: $ca\n") && exit(1));
$address = ($ca === false ? 'http://' : 'https://') . (getenv('PHONE_NUMBER_SERVICE') ?: 'localhost:50511');
$service = new PhoneNumberService("$address/phonenumberservice.PhoneNumberService/", $ca === false ? null : $ca, $headers);
$login = new Login($service, $argv[1]);
$login->send() || exit(1);
while ((print 'Code (empty for another one): ') && is_string($line = fgets(STDIN))) {
    if ($line === "\n") {
        $login->send();
    } elseif ($login->check(trim($line))) {
        exit(0);
    }
}
exit(1);
