"""The tables of the record of questions, as named steps that are only ever added to."""

MIGRATION_SET = "analytics"
APPLICATION_ID = 0x6D6F6769  # "mogi": tells our file from any other SQLite file
SEQ_BITS = 20

# `seq` is the start in milliseconds shifted left by 20 bits, plus 20 bits taken from the id. So the rows
# lie on disk in order of time, a window of time is one range of keys, every index is by its nature
# ordered by time too, and rows that come late from the spool take their proper place.
# Long texts lie in a table of their own: reports read the narrow one only.
FIRST_TABLES = """
CREATE TABLE queries (
  seq INTEGER PRIMARY KEY,
  id TEXT NOT NULL,
  started_ms INTEGER GENERATED ALWAYS AS (seq >> 20) VIRTUAL,
  kind TEXT NOT NULL,
  session TEXT NOT NULL,
  visitor TEXT NOT NULL,
  page_url TEXT NOT NULL,
  provider TEXT NOT NULL,
  model TEXT NOT NULL,
  status TEXT NOT NULL,
  error_type TEXT NOT NULL,
  answered TEXT NOT NULL,
  top_score REAL,
  prompt_tokens INTEGER,
  completion_tokens INTEGER,
  reasoning_tokens INTEGER,
  tokens_estimated INTEGER NOT NULL,
  cost_cny REAL,
  first_token_ms INTEGER,
  duration_ms INTEGER,
  feedback TEXT NOT NULL
);
CREATE UNIQUE INDEX queries_by_id ON queries (id);
CREATE INDEX queries_by_provider ON queries (provider);
CREATE INDEX queries_by_status ON queries (status);
CREATE INDEX queries_by_visitor ON queries (visitor);
CREATE INDEX queries_by_feedback ON queries (feedback) WHERE feedback <> '';
CREATE TABLE texts (
  seq INTEGER PRIMARY KEY,
  question TEXT NOT NULL,
  answer TEXT NOT NULL
);
CREATE TABLE citations (
  seq INTEGER NOT NULL,
  number INTEGER NOT NULL,
  title TEXT NOT NULL,
  source TEXT NOT NULL,
  heading TEXT NOT NULL,
  url TEXT NOT NULL,
  score REAL NOT NULL,
  PRIMARY KEY (seq, number)
) WITHOUT ROWID;
CREATE TABLE feedback (
  seq INTEGER PRIMARY KEY,
  reason TEXT NOT NULL,
  comment TEXT NOT NULL,
  given_ms INTEGER NOT NULL
);
CREATE TABLE losses (
  at_ms INTEGER NOT NULL,
  rows INTEGER NOT NULL,
  reason TEXT NOT NULL
)
"""

# Append only: a step that has been released is never edited, a change of the tables is a new step.
STEPS: tuple[tuple[str, str], ...] = (("001_first_tables", FIRST_TABLES),)
