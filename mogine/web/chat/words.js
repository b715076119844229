// The chat page's own words, in Chinese and English.

const EN = {
  title: "Assistant",
  greeting: "Hello! Ask me anything about our products and services.",
  placeholder: "Ask a question",
  send: "Send",
  stop: "Stop",
  fresh: "New chat",
  latest: "Jump to the latest",
  you: "You",
  assistant: "Assistant",
  starters: "Questions to start with",
  working: "Looking for an answer",
  thinking: "Thinking",
  thoughts: "Thoughts",
  sources: "Sources",
  source: "Source {number}: {title}",
  openSource: "Open the original",
  stopped: "Stopped.",
  answered: "The answer is complete.",
  cutShort: "The answer was cut at its greatest length.",
  withheld: "The model's service withheld part of this answer.",
  nothing: "No answer came. Please ask again.",
  retry: "Ask again",
  retryIn: "Ask again in {seconds} s",
  tooLong: "That question is too long: {length} of at most {limit} characters.",
  notice: "Answers are made by an AI and may contain mistakes.",
  hint: "Enter sends, Shift + Enter makes a new line",
  problems: {
    network: "No connection to the server. Please check your network and ask again.",
    offline: "You are offline. Please connect and ask again.",
    cut: "The connection broke off before the answer was complete.",
    rate_limited: "That was many questions in a short time. Please wait a moment.",
    too_many_streams: "Another answer of yours is still running. Please wait until it is done.",
    budget_exhausted: "The assistant has reached its limit for today. Please come back later.",
    upstream_busy: "Very many people are asking right now. Please wait a moment.",
    question_too_long: "That question is too long. Please shorten it.",
    origin_not_allowed: "This page may not use the assistant.",
    upstream: "The assistant cannot be reached at the moment. Please try again soon.",
    unavailable: "The service is busy or restarting. Please try again in a moment.",
    timeout: "The answer took too long. Please ask again.",
    unknown: "Something went wrong. Please ask again.",
  },
  requestId: "Reference: {id}",
};

/** @type {typeof EN} */
const ZH = {
  title: "智能助手",
  greeting: "您好！关于我们的产品和服务，有什么想了解的，请直接问我。",
  placeholder: "请输入您的问题",
  send: "发送",
  stop: "停止",
  fresh: "新对话",
  latest: "回到最新",
  you: "您",
  assistant: "助手",
  starters: "您可以这样问",
  working: "正在查找答案",
  thinking: "正在思考",
  thoughts: "思考过程",
  sources: "参考资料",
  source: "资料 {number}：{title}",
  openSource: "查看原文",
  stopped: "已停止。",
  answered: "回答完毕。",
  cutShort: "回答已达到最大长度，未能写完。",
  withheld: "模型服务屏蔽了部分回答。",
  nothing: "没有收到回答，请再问一次。",
  retry: "重新提问",
  retryIn: "{seconds} 秒后可重新提问",
  tooLong: "问题太长：{length} 字，最多 {limit} 字。",
  notice: "回答由人工智能生成，可能有误。",
  hint: "Enter 发送，Shift + Enter 换行",
  problems: {
    network: "无法连接服务器，请检查网络后再问一次。",
    offline: "您当前处于离线状态，请联网后再问一次。",
    cut: "连接中断，回答没有完成。",
    rate_limited: "您提问太频繁了，请稍等片刻。",
    too_many_streams: "您还有回答正在进行，请等它完成。",
    budget_exhausted: "助手今天的额度已用完，请稍后再来。",
    upstream_busy: "现在提问的人很多，请稍等片刻。",
    question_too_long: "问题太长，请缩短后再试。",
    origin_not_allowed: "此页面无权使用助手。",
    upstream: "暂时无法连接助手，请稍后再试。",
    unavailable: "服务繁忙或正在重启，请稍后再试。",
    timeout: "回答超时，请再问一次。",
    unknown: "出了点问题，请再问一次。",
  },
  requestId: "编号：{id}",
};

const REASONS = {
  upstream_refused: "upstream",
  upstream_error: "upstream",
  upstream_bad_response: "upstream",
  upstream_unavailable: "upstream",
  answer_too_long: "cut",
  upstream_timeout: "timeout",
  request_timeout: "timeout",
  overloaded: "unavailable",
  shutting_down: "unavailable",
  kb_unavailable: "unavailable",
  host_not_allowed: "origin_not_allowed",
};

/**
 * The words for the first language of the list that we speak; else those of `fallback`, else English.
 * @param {readonly string[]} languages as the browser ranks them
 * @param {string} [fallback] the site's own language
 */
export function wordsFor(languages, fallback = "") {
  for (const language of [...languages, fallback]) {
    if (/^zh\b/i.test(language)) return { language: "zh-CN", words: ZH };
    if (/^en\b/i.test(language)) return { language: "en", words: EN };
  }
  return { language: "en", words: EN };
}

/** @param {string} text @param {Record<string, string | number>} values for `{name}` in it */
export function fill(text, values) {
  return text.replace(/\{(\w+)\}/g, (whole, name) => String(values[name] ?? whole));
}

/** @param {typeof EN} words @param {import("../shared/api.js").ApiError} error @returns {string} */
export function problemText(words, error) {
  if (error.reason === "network" && !navigator.onLine) return words.problems.offline;
  const name = REASONS[/** @type {keyof typeof REASONS} */ (error.reason)] ?? error.reason;
  if (Object.hasOwn(words.problems, name)) return words.problems[/** @type {keyof typeof EN.problems} */ (name)];
  return [502, 503, 504].includes(error.status) ? words.problems.upstream : words.problems.unknown;
}
