// Logs a person in by phone number, in a terminal, with HttpClient and no package. ../README.md has the flow.
using System;
using System.Globalization;
using System.Linq;
using System.Net.Http;
using System.Net.Sockets;
using System.Runtime.Serialization.Json;
using System.Text;
using System.Threading.Tasks;
using System.Xml;
using System.Xml.Linq;

sealed class Login
{
    const string SignName = "Acme", TemplateCode = "SMS_123456789"; // as approved by Aliyun
    static readonly string[] Refusals = { "isv.BLACK_KEY_CONTROL_LIMIT", "isv.CUSTOMER_REFUSED" };
    static readonly HttpClient Client = new HttpClient { Timeout = TimeSpan.FromSeconds(15) }; // longer than a send can take
    readonly string number, url;

    Login(string number)
    {
        this.number = number;
        var scheme = Environment.GetEnvironmentVariable("PHONE_NUMBER_SERVICE_CA") == null ? "http://" : "https://";
        var address = Environment.GetEnvironmentVariable("PHONE_NUMBER_SERVICE") ?? "localhost:50511";
        url = scheme + address + "/phonenumberservice.PhoneNumberService/";
    }

    static int Main(string[] args) => Run(args[0]).GetAwaiter().GetResult();

    static async Task<int> Run(string number)
    {
        Client.DefaultRequestHeaders.Add("Verification-Context", Guid.NewGuid().ToString()); // one for each login
        var token = Environment.GetEnvironmentVariable("PHONE_NUMBER_SERVICE_TOKEN");
        if (token != null) Client.DefaultRequestHeaders.Add("Authorization", "Bearer " + token);
        var login = new Login(number);
        if (!await login.Send()) return 1;
        for (string line; (line = Ask()) != null;)
        {
            if (line == "") await login.Send();
            else if (await login.Check(line)) return 0;
        }
        return 1;
    }

    static string Ask() { Console.Write("Code (empty for another one): "); return Console.ReadLine(); }

    /// <summary>Tells if a code may arrive.</summary>
    async Task<bool> Send()
    {
        var (code, body) = await Call("SendSMS", Guid.NewGuid().ToString(), // one key for all tries
            ("phone_number", number), ("signature", SignName), ("template_code", TemplateCode));
        var info = Detail(body, "ErrorInfo");
        var fields = Detail(body, "BadRequest").Elements("fieldViolations").Elements().Select(v => (string)v.Element("field"));
        if (code == "ok") return Say($"We sent a code to {number}.", true);
        if (code == "unknown") return Say("The code may come late. Type it if it comes.", true);
        if (code == "resource_exhausted" && Wait(body) > 0) return Say($"Too many codes. Try again in {Wait(body)} seconds.", false);
        if (fields.Contains("phone_number")) return Say($"{number} is not a mobile number.", false);
        if ((string)info.Element("metadata")?.Element("refused") == "country") return Say("We cannot send codes to this country or region.", false);
        if (Refusals.Contains((string)info.Element("reason")))
            return Say("This number does not accept our SMS; please use another one, or contact us.", false);
        Console.Error.WriteLine((string)body.Element("message")); // for the operator
        return Say("No code was sent. Try again later.", false);
    }

    /// <summary>Tells if the typed code is right.</summary>
    async Task<bool> Check(string typed)
    {
        var (code, body) = await Call("Valid", null, ("phone_number", number), ("code", typed));
        if (code == "ok") return (string)body.Element("valid") == "true" ? Say("Welcome.", true) : Say("This code is not valid.", false);
        if (code == "unknown") return Say("The check may have counted. Type the code again; if it fails, ask for another one.", false);
        return Say("The code was not checked. Type it again.", false);
    }

    static bool Say(string text, bool result) { Console.WriteLine(text); return result; }

    /// <summary>Repeats a call that certainly had no effect, or whose send is under way, up to twice. The code is
    /// "unknown" if the call may have had its effect.</summary>
    async Task<(string code, XElement body)> Call(string method, string key, params (string name, string value)[] fields)
    {
        var json = new XElement("root", new XAttribute("type", "object"), fields.Select(f => new XElement(f.name, f.value)));
        for (var tries = 1; ; tries++)
        {
            var (code, body) = await Post(method, key, json);
            var again = code == "unavailable" || code == "aborted" && Wait(body) <= 1;
            if (!again || tries == 3) return (code == "aborted" || code == "deadline_exceeded" ? "unknown" : code, body);
            await Task.Delay(TimeSpan.FromSeconds(Math.Max(1, Wait(body))));
        }
    }

    async Task<(string code, XElement body)> Post(string method, string key, XElement json)
    {
        try
        {
            var stream = new System.IO.MemoryStream();
            using (var writer = JsonReaderWriterFactory.CreateJsonWriter(stream, Encoding.UTF8, false)) json.WriteTo(writer);
            var request = new HttpRequestMessage(HttpMethod.Post, url + method) { Content = new ByteArrayContent(stream.ToArray()) };
            request.Content.Headers.Add("Content-Type", "application/json");
            if (key != null) request.Headers.Add("Idempotency-Key", key);
            var response = await Client.SendAsync(request);
            var bytes = await response.Content.ReadAsByteArrayAsync();
            var body = XElement.Load(JsonReaderWriterFactory.CreateJsonReader(bytes, XmlDictionaryReaderQuotas.Max));
            var isOwn = Detail(body, "ErrorInfo").HasElements; // other errors are not from the service
            return (response.IsSuccessStatusCode ? "ok" : isOwn ? (string)body.Element("code") : "unknown", body);
        }
        catch (Exception e) when (e is HttpRequestException || e is TaskCanceledException || e is XmlException)
        {
            Console.Error.WriteLine(e.GetBaseException()); // for the operator
            var refused = e.GetBaseException() is SocketException s && s.SocketErrorCode == SocketError.ConnectionRefused;
            return (refused ? "unavailable" : "unknown", new XElement("root")); // refused: nothing was sent
        }
    }

    /// <summary>Returns the seconds to wait before the next call, from the RetryInfo of an error, or 0.</summary>
    static double Wait(XElement error) => double.Parse(
        ((string)Detail(error, "RetryInfo").Element("retryDelay") ?? "0").TrimEnd('s'), CultureInfo.InvariantCulture);

    /// <summary>Returns the detail of this kind in an error, or an empty one.</summary>
    static XElement Detail(XElement error, string kind) => error.Elements("details").Elements()
        .FirstOrDefault(d => (string)d.Element("type") == "google.rpc." + kind)?.Element("debug") ?? new XElement("none");
}
