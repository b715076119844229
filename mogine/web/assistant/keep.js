// A conversation as a file for the visitor.

import { h } from "../shared/dom.js";

/** @param {import("./assistant.js").Assistant} assistant */
export function saveConversation(assistant) {
  const address = URL.createObjectURL(new Blob([assistant.exportText()], { type: "text/markdown;charset=utf-8" }));
  const day = new Date().toISOString().slice(0, 10);
  const link = h("a", { href: address, download: `conversation-${day}.md`, hidden: true });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}
