// The texts of the page, in English and Simplified Chinese. index.html has the English
// texts that never change, with the same keys in data-t.

const chinese = /^zh/i.test(navigator.language);

const words = {
  en: {
    text: ['Your code is ', ',', ' valid for $1. Do not pass it on.'],
    minutes: '$1 min', seconds: '$1 s',
    copyCode: 'Copy the code $1', copied: 'Copied', clearOf: 'Clear the messages to $1',
    live: ['$1 attempt, $2 left', '$1 attempts, $2 left'],
    used: 'used', replaced: 'replaced by a newer code', exhausted: 'no attempts left', expired: 'expired',
    noMessages: 'No messages yet', otherNumber: 'New: $1',
    connected: 'Connected', reconnecting: 'No connection to the service',
    announcement: 'Message to $1: code $2. $3',
    suggestion: 'From Messages: $1', noLiveCode: 'The phone has no valid code for this number.',
    oneLiveCode: 'A code is valid: $1.', liveCodes: '$1 codes are valid; the newest: $2.',
    valid: 'Right. The code is used now.',
    invalid: 'Not valid. The answer is the same for a wrong, expired, used, replaced or exhausted code.',
    sent: 'Sent.', inProgress: 'Under way…', wait: 'Wait $1', waitOver: 'The wait is over', field: 'Field: ', reason: 'Reason: ',
    unreachable: 'The service does not answer. Is it still running?',
    onlyASCII: 'The verification context and the idempotency key may contain only printable ASCII characters.',
    failingAll: 'Every send fails: $2.', failingSome: ['The next send fails: $2.', 'The next $1 sends fail: $2.'],
    failingNumber: 'Sends to $3 fail: $2.', failingNumberSome: ['The next send to $3 fails: $2.', 'The next $1 sends to $3 fail: $2.'],
    succeedingNumber: 'Sends to $1 succeed.', failingMore: 'Failures are set for $1 more numbers.',
    timesInvalid: 'A whole number from 1 to 1,000; empty for all.',
    language: 'Language of the example',
    tooManyWindows: 'Still under way. If more than five windows of this page are open, close some: each holds one of the six connections that a browser opens to one address.',
    errors: {},
  },
  zh: {
    text: ['您的验证码是 ', '，', '$1内有效，请勿告知他人。'],
    minutes: '$1 分钟', seconds: '$1 秒',
    copyCode: '复制验证码 $1', copied: '已复制', clearOf: '清空发往 $1 的短信',
    live: ['还可尝试 $1 次，剩余 $2', '还可尝试 $1 次，剩余 $2'],
    used: '已使用', replaced: '已被新验证码取代', exhausted: '尝试次数已用完', expired: '已过期',
    noMessages: '暂无短信', otherNumber: '新短信：$1',
    connected: '已连接', reconnecting: '与服务的连接已断开',
    announcement: '发往 $1 的短信，验证码 $2。$3',
    suggestion: '填入短信验证码 $1', noLiveCode: '手机上没有此号码的有效验证码。',
    oneLiveCode: '当前验证码有效：$1。', liveCodes: '有 $1 个有效的验证码，最新的：$2。',
    valid: '正确，验证码已被使用。',
    invalid: '无效。错误、过期、已使用、被取代、次数用完，返回结果都相同。',
    sent: '已发送。', inProgress: '处理中…', wait: '请等待 $1', waitOver: '等待已结束', field: '字段：', reason: '原因：',
    unreachable: '服务无响应，请确认是否在运行。',
    onlyASCII: '校验上下文和幂等键只能包含 ASCII 字符。',
    failingAll: '所有发送都会失败：$2。', failingSome: ['下一次发送会失败：$2。', '接下来 $1 次发送会失败：$2。'],
    failingNumber: '发往 $3 的短信会失败：$2。', failingNumberSome: ['发往 $3 的下一条短信会失败：$2。', '发往 $3 的接下来 $1 条短信会失败：$2。'],
    succeedingNumber: '发往 $1 的短信会成功。', failingMore: '另有 $1 个号码。',
    timesInvalid: '须为 1 到 1000 的整数，留空表示全部。',
    language: '示例语言',
    tooManyWindows: '仍在处理中。如果同时打开了五个以上的本页面窗口，请关闭一些：浏览器对同一地址最多建立六个连接，每个窗口占用一个。',

    tagline: '发送验证码、查看短信、完成验证。不发送真实短信，不产生费用。',
    sendIs: '发送六位验证码', validIs: '校验验证码，仅能成功一次',
    number: '手机号码', context: '校验上下文', key: '幂等键', noContext: '无', signature: '短信签名', template: '模板 Code', code: '验证码',
    aliyun: '模拟阿里云返回', times: '生效次数', all: '全部',
    none: '发送成功', limit_minute: '分钟级流控', limit_hour: '小时级流控', limit_day: '天级流控',
    illegal_number: '非法手机号', no_balance: '余额不足', timeout: '超时，未送达', timeout_delivered: '超时，但送达',
    send: '发送验证码', verify: '验证', clear: '清空', copy: '复制', docs: '文档',
    phone: '手机', showing: '收件号码', messages: '短信', nothing: '短信会出现在这里，无论来自本页还是您自己的应用。',
    sendAnswer: 'SendSMS 的响应', validAnswer: 'Valid 的响应',
    errors: { // by reason; for others, the service's text
      INVALID_FIELD: '请求中的字段不正确。',
      SEND_IN_PROGRESS: '此号码正在进行的发送过多，或同一幂等键的发送正在进行，未发送。',
      IDEMPOTENCY_KEY_REUSED: '此幂等键已用于另一个请求，未发送。',
      TOO_MANY_SENDS: '此号码的上下文或幂等键过多，未发送。',
      SMS_TIMEOUT: '阿里云未及时响应；如果短信送达，其验证码有效。',
      'isv.BUSINESS_LIMIT_CONTROL': '已达到阿里云对此签名和号码的发送上限，未发送。',
      'isv.MOBILE_NUMBER_ILLEGAL': '阿里云拒绝了此手机号，未发送。',
      'isv.AMOUNT_NOT_ENOUGH': '阿里云账户余额不足，未发送。',
      number: '须为一个手机号码，例如 +8618612345678。',
    },
  },
}[chinese ? 'zh' : 'en'];

export const locale = chinese ? 'zh-CN' : navigator.language;

// textOf returns a text with $1, $2 … filled in. The first text of a pair is the singular.
export function textOf(key, ...values) {
  let text = words[key];
  if (Array.isArray(text)) text = text[values[0] === 1 ? 0 : 1];
  return text.replace(/\$(\d)/g, (_, n) => values[n - 1]);
}

// errorText returns the text for an error's reason; the default is the service's text.
export const errorText = (reason, message) => words.errors[reason] ?? message;

// messageParts returns the text of an SMS in three parts: before the code, the punctuation after it,
// and the rest.
export const messageParts = lifetime => words.text.map(part => part.replace('$1', lifetime));

export function translate(root) {
  if (!chinese) return;
  for (const e of root.querySelectorAll('[data-t]')) e.textContent = words[e.dataset.t];
  for (const e of root.querySelectorAll('[data-t-label]')) e.setAttribute('aria-label', words[e.dataset.tLabel]);
  for (const e of root.querySelectorAll('[data-t-placeholder]')) e.placeholder = words[e.dataset.tPlaceholder];
}

export const sampleSignName = chinese ? '阿里云' : 'Acme';
if (chinese) document.documentElement.lang = 'zh-CN';
translate(document); // before the first paint
