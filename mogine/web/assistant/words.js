// The assistant's own words, in Chinese and English.

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
  open: "Open the chat",
  close: "Close the chat",
  menu: "More",
  save: "Save this conversation",
  clear: "Delete this conversation",
  cleared: "The conversation was deleted from this browser.",
  page: "Open in a page of its own",
  copy: "Copy",
  copied: "Copied",
  good: "Helpful",
  bad: "Not helpful",
  why: "What was wrong?",
  reasons: { wrong: "It is wrong", incomplete: "Something is missing", off_topic: "Not what I asked", other: "Something else" },
  comment: "Tell us more (optional)",
  sendRating: "Send",
  thanks: "Thank you, that helps us.",
  notRated: "Your rating could not be sent.",
  handoff: "Talk to a person",
  handoffText: "We did not find this in our documents. Our staff will gladly help:",
  picture: "Scan to add us on WeChat",
  privacy: "Kept for 7 days in this browser. Please do not enter personal data.",
  privacyLink: "Privacy",
  conversations: "Your conversations",
  none: "No conversations yet",
  showList: "Show your conversations",
  resumed: "Reading on where the last page left off",
  loadFailed: "The chat could not be loaded.",
  askedAt: "Asked on {time}",
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
  open: "打开对话",
  close: "关闭对话",
  menu: "更多",
  save: "保存本次对话",
  clear: "删除本次对话",
  cleared: "已从本浏览器删除该对话。",
  page: "在单独页面中打开",
  copy: "复制",
  copied: "已复制",
  good: "有帮助",
  bad: "没有帮助",
  why: "哪里有问题？",
  reasons: { wrong: "内容有误", incomplete: "不够完整", off_topic: "答非所问", other: "其他" },
  comment: "补充说明（选填）",
  sendRating: "提交",
  thanks: "感谢您的反馈。",
  notRated: "反馈未能提交。",
  handoff: "联系人工客服",
  handoffText: "资料中没有找到相关内容，我们的工作人员很乐意为您解答：",
  picture: "微信扫码添加客服",
  privacy: "对话仅在本浏览器保存 7 天，请勿填写个人隐私信息。",
  privacyLink: "隐私政策",
  conversations: "我的对话",
  none: "还没有对话",
  showList: "显示我的对话",
  resumed: "正在接着上一页继续回答",
  loadFailed: "对话加载失败。",
  askedAt: "提问时间：{time}",
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
 * The words in the site's language when that is fixed; else for the first language of the list that we
 * speak, else English.
 * @param {readonly string[]} languages in order of preference
 * @param {string} [site] the site's own language; "auto" leaves it to the visitor
 */
export function wordsFor(languages, site = "auto") {
  for (const language of [site, ...languages]) {
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
