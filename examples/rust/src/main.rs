//! Logs a person in by phone number, in a terminal. ../README.md has the flow.

use pb::{phone_number_service_client::PhoneNumberServiceClient, SendSmsRequest, ValidRequest};
use std::io::{stdin, stdout, Write};
use std::{env, error::Error, fs, process::exit, time::Duration};
use tokio::time::sleep;
use tonic::metadata::MetadataMap;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use tonic::{Code, Request, Status};
use tonic_types::StatusExt;
use uuid::Uuid;

mod pb {
    tonic::include_proto!("phonenumberservice");
}

struct Login {
    client: PhoneNumberServiceClient<Channel>,
    number: String,
    headers: MetadataMap,
}

impl Login {
    /// Tells if a code may arrive.
    async fn send(&self) -> Result<bool, Box<dyn Error>> {
        let (signature, template_code) = ("Acme".into(), "SMS_123456789".into()); // as approved by Aliyun
        let message = SendSmsRequest { phone_number: self.number.clone(), signature, template_code };
        let mut headers = self.headers.clone();
        headers.insert("idempotency-key", Uuid::new_v4().to_string().parse()?); // one for all tries
        let sent = call(async || self.client.clone().send_sms(request(&headers, &message)).await).await;
        println!("{}", sent.as_ref().map_or_else(|status| problem(&self.number, status), |_| format!("We sent a code to {}.", self.number)));
        Ok(sent.map_or_else(|status| status.code() == Code::Unknown, |_| true))
    }

    /// Tells if the typed code is right.
    async fn check(&self, typed: &str) -> bool {
        let message = ValidRequest { phone_number: self.number.clone(), code: typed.into() };
        let checked = call(async || self.client.clone().valid(request(&self.headers, &message)).await).await;
        match &checked {
            Ok(response) if response.get_ref().valid => println!("Welcome."),
            Ok(_) => println!("This code is not valid."),
            Err(status) if status.code() == Code::Unknown => println!("The check may have counted. Type the code again; if it fails, ask for another one."),
            Err(_) => println!("The code was not checked. Type it again."),
        }
        checked.is_ok_and(|response| response.get_ref().valid)
    }
}

fn request<M: Clone>(headers: &MetadataMap, message: &M) -> Request<M> {
    let mut request = Request::from_parts(headers.clone(), Default::default(), message.clone());
    request.set_timeout(Duration::from_secs(15)); // longer than a send can take
    request
}

/// Returns the text for a person whose send failed.
fn problem(number: &str, status: &Status) -> String {
    let Some(info) = status.get_details_error_info() else { return "The code may come late. Type it if it comes.".into() };
    let invalid = status.get_details_bad_request().map_or(vec![], |request| request.field_violations);
    match (status.code(), info.reason.as_str()) {
        (Code::ResourceExhausted, _) if wait(status) > Duration::ZERO => format!("Too many codes. Try again in {} seconds.", wait(status).as_secs_f64().ceil()),
        _ if invalid.iter().any(|violation| violation.field == "phone_number") => format!("{number} is not a mobile number."),
        _ if info.metadata.get("refused").is_some_and(|refused| refused == "country") => "We cannot send codes to this country or region.".into(),
        (_, "isv.BLACK_KEY_CONTROL_LIMIT" | "isv.CUSTOMER_REFUSED") => "This number does not accept our SMS; please use another one, or contact us.".into(),
        _ => "No code was sent. Try again later.".into(),
    }
}

/// Repeats a call that certainly had no effect, or whose send is under way, up to twice. The status is Unknown, without
/// details, if the call may have had its effect. An error without an ErrorInfo is not from the service.
async fn call<R>(method: impl AsyncFn() -> Result<R, Status>) -> Result<R, Status> {
    let mut tries = 0;
    loop {
        let status = match method().await { Err(status) => status, response => return response };
        eprintln!("{status}"); // for the operator
        tries += 1;
        match status.code() {
            _ if status.get_details_error_info().is_none() => return Err(Status::unknown("")),
            Code::Unavailable if tries < 3 => {}
            Code::Aborted if tries < 3 && wait(&status).as_secs() <= 1 => {}
            Code::Aborted | Code::DeadlineExceeded | Code::Unknown => return Err(Status::unknown("")),
            _ => return Err(status),
        }
        sleep(wait(&status).max(Duration::from_secs(1))).await;
    }
}

/// Returns the time to wait before the next call, from the RetryInfo of an error, or zero.
fn wait(status: &Status) -> Duration {
    status.get_details_retry_info().and_then(|retry| retry.retry_delay).unwrap_or_default()
}

#[tokio::main(worker_threads = 1)]
async fn main() -> Result<(), Box<dyn Error>> {
    let address = env::var("PHONE_NUMBER_SERVICE").unwrap_or("localhost:50511".into());
    let endpoint = match env::var_os("PHONE_NUMBER_SERVICE_CA") {
        Some(ca) => Endpoint::from_shared(format!("https://{address}"))?
            .tls_config(ClientTlsConfig::new().ca_certificate(Certificate::from_pem(fs::read(&ca).map_err(|err| format!("{ca:?}: {err}"))?)))?,
        None => Endpoint::from_shared(format!("http://{address}"))?,
    };
    let (interval, timeout) = (Duration::from_secs(10), Duration::from_secs(5));
    let endpoint = endpoint.http2_keep_alive_interval(interval).keep_alive_timeout(timeout).keep_alive_while_idle(true);
    let mut headers = MetadataMap::new();
    headers.insert("verification-context", Uuid::new_v4().to_string().parse()?); // one for each login
    if let Ok(token) = env::var("PHONE_NUMBER_SERVICE_TOKEN") {
        headers.insert("authorization", format!("Bearer {token}").parse()?);
    }
    let client = PhoneNumberServiceClient::new(endpoint.connect_lazy());
    let login = Login { client, number: env::args().nth(1).ok_or("usage: login PHONE-NUMBER")?, headers };
    if !login.send().await? { exit(1) }
    loop {
        print!("Code (empty for another one): ");
        stdout().flush()?;
        match stdin().lines().next().transpose()?.as_deref() {
            None => exit(1),
            Some("") => _ = login.send().await?,
            Some(typed) if login.check(typed).await => return Ok(()),
            Some(_) => {}
        }
    }
}
