// The lines that make a call in other languages, as the page shows them. They are built like the
// programs of examples/, and TestPage_SnippetsRun runs them.

const json = fields => JSON.stringify(fields, null, 1).replace(/\n */g, ' '); // spaces allow line breaks
const shell = text => `'${text.replaceAll("'", `'\\''`)}'`;
const flags = headers => Object.entries(headers).map(([name, value]) => `-H ${shell(`${name}: ${value}`)} `).join('');
const pairs = headers => Object.entries(headers).map(pair => pair.map(text => JSON.stringify(text)).join(', '));
const pascal = name => name.replace(/(?:^|_)(.)/g, (_, first) => first.toUpperCase());
const path = method => `/phonenumberservice.PhoneNumberService/${method}`;
const hasResult = method => method === 'Valid';
const php = text => `'${text.replace(/[\\']/g, '\\$&')}'`;
const entries = (values, write) => Object.entries(values).map(([name, value]) => write(name, value)).join(', ');

// snippets returns a function for each language. It takes a method, its fields and its headers.
export const snippets = ({ origin, host }) => ({
  curl: (method, fields, headers) => `curl ${flags(headers)}-d ${shell(json(fields))} \\
${origin}${path(method)}`,

  grpcurl: (method, fields, headers) => `grpcurl -plaintext ${hasResult(method) ? '-emit-defaults ' : ''}${flags(headers)}\\
  -d ${shell(json(fields))} \\
  ${host} phonenumberservice.PhoneNumberService/${method}`,

  Go: (method, fields, headers) => `conn, err := grpc.NewClient(${JSON.stringify(host)}, grpc.WithTransportCredentials(insecure.NewCredentials()))
if err != nil {
	return err
}
defer conn.Close()
client := phonenumberservice.NewPhoneNumberServiceClient(conn)
ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
defer cancel()${pairs(headers).length ? `
ctx = metadata.AppendToOutgoingContext(ctx, ${pairs(headers).join(', ')})` : ''}
${hasResult(method) ? 'res, err :=' : '_, err ='} client.${method}(ctx, &phonenumberservice.${method}Request{${
  entries(fields, (name, value) => `${pascal(name)}: ${JSON.stringify(value)}`)}})
if err != nil {
	return err
}${hasResult(method) ? '\nfmt.Println(res.Valid)' : ''}`,

  Java: (method, fields, headers) => `var channel = Grpc.newChannelBuilder(${JSON.stringify(host)}, InsecureChannelCredentials.create()).build();
var headers = new Metadata();${pairs(headers).map(pair => `
headers.put(Metadata.Key.of(${pair.replace(', ', ', Metadata.ASCII_STRING_MARSHALLER), ')});`).join('')}
var stub = PhoneNumberServiceGrpc.newBlockingStub(channel)
    .withInterceptors(MetadataUtils.newAttachHeadersInterceptor(headers)).withDeadlineAfter(15, TimeUnit.SECONDS);
var response = stub.${method[0].toLowerCase() + method.slice(1)}(${method}Request.newBuilder()${
  Object.entries(fields).map(([name, value]) => `\n    .set${pascal(name)}(${JSON.stringify(value)})`).join('')}.build());
${hasResult(method) ? 'System.out.println(response.getValid());\n' : ''}channel.shutdown();`,

  'Node.js': (method, fields, headers) => `const response = await fetch(${JSON.stringify(origin + path(method))}, {
  method: 'POST',
  headers: ${json({ 'content-type': 'application/json', ...headers })},
  body: JSON.stringify(${json(fields)}),
  signal: AbortSignal.timeout(15_000),
});
console.log(await response.json());`,

  Python: (method, fields, headers) => `import grpc
import phonenumberservice_pb2 as pb
import phonenumberservice_pb2_grpc as pb_grpc

with grpc.insecure_channel(${JSON.stringify(host)}) as channel:
    stub = pb_grpc.PhoneNumberServiceStub(channel)
    response = stub.${method}(pb.${method}Request(${
  entries(fields, (name, value) => `${name}=${JSON.stringify(value)}`)}), timeout=15${
  pairs(headers).length ? `, metadata=[${pairs(headers).map(pair => `(${pair})`).join(', ')}]` : ''})${hasResult(method) ? `
    print(response.valid)` : ''}`,

  PHP: (method, fields, headers) => `$curl = curl_init(${php(origin + path(method))});
curl_setopt_array($curl, [
    CURLOPT_HTTPHEADER => [${entries({ 'Content-Type': 'application/json', ...headers }, (name, value) => php(`${name}: ${value}`))}],
    CURLOPT_POSTFIELDS => json_encode([${entries(fields, (name, value) => `${php(name)} => ${php(value)}`)}]),
    CURLOPT_TIMEOUT => 15,
]);
curl_exec($curl);`,
});
