// The dashboard's words, in Chinese and English.

const EN = {
  locale: "en-GB",
  views: { overview: "Overview", conversations: "Conversations", gaps: "Gaps", knowledge: "Knowledge", cost: "Cost", quality: "Quality", system: "System" },
  signIn: "Sign in", signInHow: "Run this on the server and open the link it prints:", orToken: "Or enter the admin token", token: "Admin token", signOut: "Sign out",
  badLink: "This link was used already, or is older than 30 minutes. Make a new one.", badToken: "That is not the admin token.",
  range: "Range", today: "Today", days: (n) => `${n} days`, custom: "Custom", from: "From", to: "To", apply: "Show", compare: "Compare with the time before", bots: "Show crawlers", exportCsv: "Export",
  zone: (zone) => `Days of ${zone}`, loading: "Loading", failed: "This could not be loaded", again: "Try again", nothing: "Nothing here yet", asTable: "As a table", day: "Day", most: "at most", same: "unchanged", newSince: "none before", before: "against the time before", weekday: "Weekday", when: "When people ask",
  weekdays: ["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"],
  emptyTitle: "No questions in this time", emptyHow: "Ask the first one: open the chat page, press a button of the widget, or run", emptyThen: "It appears here within a second.",
  questions: "Questions", visitors: "Visitors", answeredShare: "Answered", thumbs: "Thumbs up / down", cost: "Cost", firstToken: "First word, median", firstWord: "First word", errorShare: "Errors", crawlers: "Crawlers", previous: "Time before", perDay: "Questions per day", topQuestions: "Asked most often", topSources: "Documents cited most", unanswered: "Unanswered", live: "Latest questions", title: "Title", source: "Source", score: "Score", question: "Question",
  time: "Time", status: "Status", answered: "Answered", provider: "Provider", model: "Model", rating: "Rating", all: "All", search: "Search", searchText: "Words in question or answer", more: "Show more", back: "Back to the list", conversation: "Conversation", trace: "Trace", searchTime: "Search in the documents", total: "Total time", tokens: "Tokens (in / out / thinking)", estimated: "estimated", page: "Page", passages: "Passages", noText: "The text is not kept.", errorType: "Reason", visitor: "Visitor", requestId: "Request", you: "Visitor", assistant: "Assistant", yes: "yes", no: "no", unknown: "unknown",
  statuses: { ok: "ok", error: "error", aborted: "left", refused: "refused" }, ratings: { up: "up", down: "down", any: "any" },
  gapsLead: "What visitors asked and the documents did not answer. Accept a gap by naming the document that shall answer it: this writes a test, and the gap closes by itself when a new generation passes it.",
  gapStates: { todo: "To do", open: "Open", accepted: "Accepted", closed: "Closed", ignored: "Ignored", all: "All" }, askedBy: (people, times) => `${people} ${people === "1" ? "visitor" : "visitors"} · asked ${times === "1" ? "once" : `${times} times`}`, accept: "Accept", ignore: "Ignore", reopen: "Open again", reason: "Reason", expect: "Document that shall answer it", contains: "Words the passage must hold (optional)", nearest: "Nearest passage", evidence: "Test", passed: "passed", notPassed: "not yet passed", rank: "rank", looking: "Looking for new gaps …", signals: { no_passage: "no passage found", declined: "answer declined", thumbs_down: "thumb down", rephrased: "asked again", handoff: "asked for a person" }, lastAsked: "last asked", weight: "weight", showQuestions: "Questions", cancel: "Cancel", save: "Save",
  searchKb: "Search as the assistant does", documents: "Documents", pieces: "Passages", upload: "Add documents", uploading: "Being taken in; large documents take a minute", uploaded: (n) => `${n} taken in`, remove: "Remove", removeSure: (name) => `Remove "${name}" from the knowledge base?`, hits: "Cited", characters: "Characters", updated: "Updated", generations: "Generations", serves: "serves", rollback: "Go back to this one", rollbackSure: (name) => `Let generation ${name} serve again?`, generation: "Generation", created: "Made", bytes: "Size", found: "Found", took: "Took", noDocuments: "There are no documents yet: add some here, or run mogine kb ingest ./docs on the server.", dropHere: "PDF, Word, PowerPoint, Excel, HTML, Markdown, text", kbDown: "The knowledge base does not answer.", damaged: "damaged",
  spentToday: "Spent today", spentMonth: "Spent this month", forecast: "This month, at this pace", budgetOf: (x) => `of ${x}`, noBudget: "no budget is set", byProvider: "By provider", byModel: "By model", costPerDay: "Cost per day", perQuestion: "Per question", dailyBudget: "Daily budget", monthlyBudget: "Monthly budget", used: "used",
  latency: "Waiting time", p50: "half of all", p95: "95 of 100", p99: "99 of 100", wholeAnswer: "Whole answer", errorsPerDay: "Errors and refusals per day", errors: "Errors", refused: "Refused", aborted: "Left", byError: "By reason", breakers: "Vendors", breaker: "Circuit breaker", keys: "Keys", resting: "Resting", breakerStates: { closed: "in use", open: "left alone", half_open: "being tried" }, noVendors: "No vendor is set up: answers are quoted passages.", reasonNone: "(none)",
  servers: "Servers", ready: "ready", not_ready: "not ready", unreachable: "not reachable", versions: "Versions", disk: "Disk", free: "free", files: "Files", fileNames: { record: "Record of questions", knowledge: "Knowledge base", spool: "Waiting to be recorded", backups: "Backups", all: "All of data/" }, doctor: "Doctor", doctorHow: "Looks at settings, keys, files, servers, the record, the documents and the disk, as mogine doctor does.", kept: (n) => `Questions are kept for ${n} days`, newestBackup: (when) => `The newest backup is of ${when}`, noBackup: "There is no backup in data/backups: mogine backup makes one", name: "Name", detail: "Detail", fix: "What helps", look: "Look now",
  definitions: /** @type {Record<string, string>} */ ({}),
  meanings: {
    questions: "One for each question of a person, whatever became of it; crawlers are left out.",
    unanswered: "Questions known not to be answered.",
    hits: "Questions under whose answer the document was cited; one answer can cite several.",
    thumbs: "Last thumbs of the questions, up and down.",
    score: "How near the passage is to the question, from 0 to 1; over several citations the mean.",
    pieces: "Pieces into which documents are cut; each is found by itself.",
    characters: "Characters of the document's text.",
    cost: "In CNY, by the prices of the day; questions without a known price count nothing.",
    perQuestion: "Cost divided by questions.",
    tokens: "Sent to the vendor, received from it with its thinking, and the thinking alone, as the vendor counted.",
    errors: "Questions that failed, at a vendor or here.",
    refused: "Questions turned away by a limit, a budget or a check.",
    aborted: "Answers that the visitor left or stopped.",
    firstWord: "From the question's arrival to the first word sent.",
    total: "From the question's arrival to the answer's end.",
    searchTime: "What finding the passages took, before the vendor was asked.",
    forecast: "What this month has cost so far, carried on to its last day; none in the month's first hours.",
    keys: "How many keys of this vendor are set.",
    resting: "Keys that the vendor has refused or slowed down; they are left alone for a while.",
    took: "How long the server took to say how it is.",
    bytes: "Room on the disk.",
  },
};

/** @type {typeof EN} */
const ZH = {
  locale: "zh-CN",
  views: { overview: "概览", conversations: "对话", gaps: "待补知识", knowledge: "知识库", cost: "费用", quality: "质量", system: "系统" },
  signIn: "登录", signInHow: "在服务器上运行下面的命令，并打开它给出的链接：", orToken: "或输入管理令牌", token: "管理令牌", signOut: "退出",
  badLink: "此链接已使用过，或已超过 30 分钟。请重新生成。", badToken: "管理令牌不正确。",
  range: "时间", today: "今天", days: (n) => `${n} 天`, custom: "自定义", from: "从", to: "到", apply: "查看", compare: "与上一时段比较", bots: "显示爬虫", exportCsv: "导出",
  zone: (zone) => `时区 ${zone}`, loading: "加载中", failed: "加载失败", again: "重试", nothing: "暂无数据", asTable: "查看表格", day: "日期", most: "最高", same: "持平", newSince: "此前没有", before: "与上一时段相比", weekday: "星期", when: "提问时段",
  weekdays: ["周一", "周二", "周三", "周四", "周五", "周六", "周日"],
  emptyTitle: "这段时间没有提问", emptyHow: "提出第一个问题：打开对话页面、点击网页上的对话按钮，或运行", emptyThen: "一秒内即会出现在这里。",
  questions: "提问", visitors: "访客", answeredShare: "已解答", thumbs: "好评 / 差评", cost: "费用", firstToken: "首字时间（中位）", firstWord: "首字时间", errorShare: "出错率", crawlers: "爬虫", previous: "上一时段", perDay: "每日提问", topQuestions: "最常问", topSources: "引用最多的文档", unanswered: "未解答", live: "最新提问", title: "标题", source: "来源", score: "得分", question: "问题",
  time: "时间", status: "状态", answered: "是否解答", provider: "供应商", model: "模型", rating: "评价", all: "全部", search: "搜索", searchText: "问题或回答中的文字", more: "显示更多", back: "返回列表", conversation: "对话", trace: "过程", searchTime: "检索文档", total: "总时长", tokens: "Token（输入 / 输出 / 思考）", estimated: "估算", page: "页面", passages: "引用段落", noText: "未保存文本。", errorType: "原因", visitor: "访客", requestId: "请求编号", you: "访客", assistant: "助手", yes: "是", no: "否", unknown: "未知",
  statuses: { ok: "完成", error: "出错", aborted: "离开", refused: "拒绝" }, ratings: { up: "好评", down: "差评", any: "有评价" },
  gapsLead: "访客问过、文档没能回答的问题。指定应当回答它的文档即为接受：系统会写下一条测试，新一代知识库通过测试后自动关闭。",
  gapStates: { todo: "待处理", open: "未处理", accepted: "已接受", closed: "已解决", ignored: "已忽略", all: "全部" }, askedBy: (people, times) => `${people} 位访客 · ${times} 次提问`, accept: "接受", ignore: "忽略", reopen: "重新打开", reason: "理由", expect: "应当回答它的文档", contains: "段落必须包含的文字（选填）", nearest: "最接近的段落", evidence: "测试", passed: "已通过", notPassed: "尚未通过", rank: "排名", looking: "正在查找新的缺口……", signals: { no_passage: "没有找到段落", declined: "回答说不知道", thumbs_down: "差评", rephrased: "再次提问", handoff: "要求人工" }, lastAsked: "最近提问", weight: "权重", showQuestions: "原问题", cancel: "取消", save: "保存",
  searchKb: "像助手一样检索", documents: "文档", pieces: "段落", upload: "添加文档", uploading: "正在收录，较大的文档需要一分钟左右", uploaded: (n) => `已收录 ${n} 份`, remove: "删除", removeSure: (name) => `从知识库中删除“${name}”？`, hits: "被引用", characters: "字符数", updated: "更新时间", generations: "版本", serves: "使用中", rollback: "恢复到此版本", rollbackSure: (name) => `恢复使用版本 ${name}？`, generation: "版本", created: "生成时间", bytes: "大小", found: "检索结果", took: "用时", noDocuments: "还没有文档：在这里添加，或在服务器上运行 mogine kb ingest ./docs。", dropHere: "支持 PDF、Word、PowerPoint、Excel、HTML、Markdown、纯文本", kbDown: "知识库没有响应。", damaged: "已损坏",
  spentToday: "今日花费", spentMonth: "本月花费", forecast: "按此速度本月合计", budgetOf: (x) => `预算 ${x}`, noBudget: "未设预算", byProvider: "按供应商", byModel: "按模型", costPerDay: "每日费用", perQuestion: "每次提问", dailyBudget: "每日预算", monthlyBudget: "每月预算", used: "已用",
  latency: "等待时间", p50: "半数以内", p95: "95% 以内", p99: "99% 以内", wholeAnswer: "完整回答", errorsPerDay: "每日出错与拒绝", errors: "出错", refused: "拒绝", aborted: "离开", byError: "按原因", breakers: "模型服务", breaker: "熔断器", keys: "密钥", resting: "休息中", breakerStates: { closed: "正常", open: "暂停", half_open: "试探中" }, noVendors: "没有配置模型服务：直接引用段落作答。", reasonNone: "（无）",
  servers: "服务", ready: "就绪", not_ready: "未就绪", unreachable: "无法连接", versions: "版本", disk: "磁盘", free: "可用", files: "文件", fileNames: { record: "提问记录", knowledge: "知识库", spool: "等待写入", backups: "备份", all: "data/ 合计" }, doctor: "体检", doctorHow: "与 mogine doctor 相同：检查设置、密钥、文件、服务、记录、文档与磁盘。", kept: (n) => `提问保留 ${n} 天`, newestBackup: (when) => `最近一次备份：${when}`, noBackup: "data/backups 中还没有备份，可运行 mogine backup", name: "项目", detail: "说明", fix: "处理办法", look: "立即检查",
  definitions: {
    questions: "记录的提问数：一人一问算一条，无论结果如何；爬虫不计。",
    visitors: "不同访客数。访客以每日更换的加盐散列区分，多日为各日之和。",
    answered_share: "已知得到解答的占比：已解答 ÷（已解答＋未解答），未知的不计。",
    thumbs_up: "最后给出好评或差评的提问数。",
    cost_cny: "按当日价格计算的费用之和（元）；没有价格的提问不计。",
    first_token_ms: "从提问到达至发出第一个字的时间，误差不超过 1%。",
    duration_ms: "从提问到达至回答结束的时间，只计完成的回答，误差不超过 1%。",
    error_share: "出错数 ÷ 提问数。",
    bots: "以自报名称识别的爬虫的提问数，不计入其他数字。",
  },
  meanings: {
    questions: "一人一问算一条，无论结果如何；爬虫不计。",
    unanswered: "已知未得到解答的提问数。",
    hits: "回答引用了该文档的提问数；一个回答可引用多份文档。",
    thumbs: "提问最后得到的好评数与差评数。",
    score: "段落与问题的接近程度，0 到 1；多次引用取平均。",
    pieces: "文档切分成的片段，检索以片段为单位。",
    characters: "文档正文的字符数。",
    cost: "按当日价格计算（元）；没有价格的提问不计。",
    perQuestion: "费用 ÷ 提问数。",
    tokens: "发给模型服务的、收到的（含思考）、其中思考的 Token 数，以对方计数为准。",
    errors: "在模型服务或本站出错的提问数。",
    refused: "因限流、预算或检查而被拒绝的提问数。",
    aborted: "访客离开或停止的回答数。",
    firstWord: "从提问到达至发出第一个字的时间。",
    total: "从提问到达至回答结束的时间。",
    searchTime: "询问模型之前检索段落所用的时间。",
    forecast: "本月至今的花费按同样速度推算到月底；月初几小时不作推算。",
    keys: "为该模型服务配置的密钥数。",
    resting: "被对方拒绝或限速、暂时停用的密钥数。",
    took: "该服务回答自身状态所用的时间。",
    bytes: "占用的磁盘空间。",
  },
};

const wanted = new URLSearchParams(location.search).get("lang");
const languages = wanted ? [wanted, ...navigator.languages] : navigator.languages;
const first = languages.find((language) => /^(zh|en)\b/i.test(language)) ?? "en";

/** The words of the browser's language. */
export const t = /^zh/i.test(first) ? ZH : EN;

const meanings = new Map(Object.entries(t.meanings).map(([name, meaning]) => [t[/** @type {"cost"} */ (name)], meaning]));

/** What a number called `label` means; "" for what needs no words. @param {string} label */
export function meaningOf(label) {
  return meanings.get(label) ?? "";
}
document.documentElement.lang = /^zh/i.test(first) ? "zh-CN" : "en";
