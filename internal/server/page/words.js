// What the page says, in English and Simplified Chinese. index.html holds the
// English of what never changes, under the same keys in data-t.

const chinese = /^zh/i.test(navigator.language);

const words = {
  en: {
    text: ['Your code is ', ',', ' valid for $1. Do not pass it on.'],
    minutes: '$1 min', seconds: '$1 s',
    copyCode: 'Copy the code $1', copied: 'Copied',
    life: ['$1 attempt, $2 left', '$1 attempts, $2 left'],
    used: 'used', replaced: 'replaced by a newer code', spent: 'no attempts left', expired: 'expired',
    to: 'To $1', nobody: 'No messages yet', other: 'New message to $1',
    connected: 'Connected', reconnecting: 'No connection to the service',
    heard: 'Message to $1 from $2: code $3',
    from: 'From Messages: $1', noneAlive: 'No code of this number is alive.',
    aliveNow: 'A code is alive: $1.', moreAlive: '$1 codes are alive; the newest: $2.',
    right: 'Right. The code is used now.',
    wrong: 'Not valid. Wrong, expired, used, replaced and no attempts left are one answer.',
    sent: 'Sent.', wait: 'Wait $1', waited: 'The wait is over', field: 'Field', reason: 'Reason', retry: 'Retry',
    unreachable: 'The service does not answer. Is it still running?',
    failingAll: 'Every send fails: $1.', failingSome: ['The next send fails: $2.', 'The next $1 sends fail: $2.'],
    failingNumber: 'Sends to $1 fail: $2.',
    language: 'Language of the lines', inLanguage: 'Lines for $1',
  },
  zh: {
    text: ['您的验证码是 ', '，', '$1内有效，请勿告知他人。'],
    minutes: '$1 分钟', seconds: '$1 秒',
    copyCode: '复制验证码 $1', copied: '已复制',
    life: ['还可试 $1 次，剩余 $2', '还可试 $1 次，剩余 $2'],
    used: '已使用', replaced: '已被新验证码取代', spent: '尝试次数已用完', expired: '已过期',
    to: '发往 $1', nobody: '暂无短信', other: '$1 有新短信',
    connected: '已连接', reconnecting: '与服务的连接已断开',
    heard: '$2 发给 $1 的短信，验证码 $3',
    from: '来自短信：$1', noneAlive: '此号码没有有效的验证码。',
    aliveNow: '有一个有效的验证码：$1。', moreAlive: '有 $1 个有效的验证码，最新的：$2。',
    right: '正确，验证码已被使用。',
    wrong: '无效。错误、过期、已使用、被取代、次数用完，答复都一样。',
    sent: '已发送。', wait: '请等待 $1', waited: '等待已结束', field: '字段', reason: '原因', retry: '重试',
    unreachable: '服务没有应答，它还在运行吗？',
    failingAll: '所有发送都会失败：$1。', failingSome: ['下一次发送会失败：$2。', '接下来 $1 次发送会失败：$2。'],
    failingNumber: '发往 $1 的短信会失败：$2。',
    language: '代码语言', inLanguage: '$1 代码',

    tagline: '发送验证码，看它到达，验证它。不发送真实短信，不产生费用。',
    sendIs: '发送六位验证码', validIs: '验证码是否正确，只认一次',
    number: '手机号码', signature: '短信签名', template: '模板代码', code: '验证码',
    aliyun: '阿里云的答复', times: '次数', always: '每次发送', once: '下一次发送',
    succeeds: 'OK，短信到达', limit_minute: '分钟级限流', limit_hour: '小时级限流', limit_day: '天级限流',
    illegal_number: '号码非法', no_balance: '余额不足', timeout: '超时，无短信', timeout_delivered: '超时，短信仍到',
    send: '发送验证码', verify: '验证', clear: '清空', copy: '复制', docs: '文档',
    phone: '手机', showing: '收件号码', messages: '短信', none: '短信会出现在这里，无论来自本页还是您自己的应用。',
    sendAnswer: 'SendSMS 的答复', validAnswer: 'Valid 的答复',
  },
}[chinese ? 'zh' : 'en'];

export const locale = chinese ? 'zh-CN' : navigator.language;

// say returns a text with $1, $2 … filled in. Of a pair the first is for one.
export function say(key, ...values) {
  let text = words[key];
  if (Array.isArray(text)) text = text[values[0] === 1 ? 0 : 1];
  return text.replace(/\$(\d)/g, (_, n) => values[n - 1]);
}

// around returns a message's text before the code, the sign that stands at the
// code, and the rest.
export const around = life => words.text.map(part => part.replace('$1', life));

export function translate(root) {
  if (!chinese) return;
  for (const e of root.querySelectorAll('[data-t]')) e.textContent = words[e.dataset.t];
  for (const e of root.querySelectorAll('[data-t-label]')) e.setAttribute('aria-label', words[e.dataset.tLabel]);
}

export const sample = chinese ? '阿里云' : 'Acme';
if (chinese) document.documentElement.lang = 'zh-CN';
translate(document); // before anything is painted
