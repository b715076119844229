"""The tables of the record of questions, as named steps that are only ever added to."""

MIGRATION_SET = "analytics"
APPLICATION_ID = 0x6D6F6769  # "mogi": tells our file from any other SQLite file
SEQ_BITS = 20
BUCKET_BITS = 46  # a bucket is 18.6 hours

# What is written of one question into the table `queries`; texts and citations have tables of their own.
ROW_COLUMNS = (
    "seq", "id", "kind", "session", "visitor", "page_url", "provider", "model", "status", "error_type",
    "answered", "top_score",
    "prompt_tokens", "completion_tokens", "reasoning_tokens", "tokens_estimated", "cost_cny",
    "first_token_ms", "duration_ms", "feedback", "bot", "signals", "search_ms",
)  # fmt: skip

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

# What statistics and searches read, made behind the writer, so that recording stays as quick as it was; see
# rollups.py and search.py. A bucket is 18.6 hours of rows: through it the indexes of
# the random visitor and session ids grow at one end only, where the newest rows are, and shrink at the other.
ROLLUPS = """
ALTER TABLE queries ADD COLUMN bot INTEGER NOT NULL DEFAULT 0;
ALTER TABLE queries ADD COLUMN bucket INTEGER GENERATED ALWAYS AS (seq >> 46) VIRTUAL;
DROP INDEX queries_by_visitor;
CREATE INDEX queries_by_visitor ON queries (bucket, visitor);
CREATE INDEX queries_by_session ON queries (bucket, session);
CREATE INDEX queries_by_model ON queries (model);
CREATE INDEX queries_by_kind ON queries (kind);
CREATE INDEX queries_by_answered ON queries (answered);
CREATE TABLE rollups (
  dimension TEXT NOT NULL,
  level INTEGER NOT NULL,
  slot INTEGER NOT NULL,
  value TEXT NOT NULL,
  questions INTEGER NOT NULL,
  visitors INTEGER NOT NULL,
  sessions INTEGER NOT NULL,
  ok INTEGER NOT NULL,
  errors INTEGER NOT NULL,
  aborted INTEGER NOT NULL,
  refused INTEGER NOT NULL,
  answered INTEGER NOT NULL,
  unanswered INTEGER NOT NULL,
  thumbs_up INTEGER NOT NULL,
  thumbs_down INTEGER NOT NULL,
  prompt_tokens INTEGER NOT NULL,
  completion_tokens INTEGER NOT NULL,
  reasoning_tokens INTEGER NOT NULL,
  estimated INTEGER NOT NULL,
  cost_cny REAL NOT NULL,
  first_tokens INTEGER NOT NULL,
  first_token_ms INTEGER NOT NULL,
  durations INTEGER NOT NULL,
  duration_ms INTEGER NOT NULL,
  citations INTEGER NOT NULL,
  score REAL NOT NULL,
  PRIMARY KEY (dimension, level, slot, value)
) WITHOUT ROWID;
CREATE TABLE waits (
  level INTEGER NOT NULL,
  slot INTEGER NOT NULL,
  first_token BLOB NOT NULL,
  duration BLOB NOT NULL,
  PRIMARY KEY (level, slot)
) WITHOUT ROWID;
CREATE TABLE asked (
  slot INTEGER NOT NULL,
  key INTEGER NOT NULL,
  seq INTEGER NOT NULL,
  questions INTEGER NOT NULL,
  unanswered INTEGER NOT NULL,
  PRIMARY KEY (slot, key)
) WITHOUT ROWID;
CREATE TABLE sources (
  source TEXT PRIMARY KEY,
  title TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE state (
  name TEXT PRIMARY KEY,
  value INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE segments (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  live INTEGER NOT NULL,
  first_seq INTEGER NOT NULL,
  last_seq INTEGER NOT NULL,
  seqs BLOB NOT NULL
);
CREATE TABLE terms (
  segment INTEGER NOT NULL,
  term TEXT NOT NULL,
  places BLOB NOT NULL,
  PRIMARY KEY (segment, term)
) WITHOUT ROWID;
CREATE TABLE unindexed (
  seq INTEGER PRIMARY KEY
);
CREATE TABLE uncounted (
  seq INTEGER PRIMARY KEY
)
"""

# What went unanswered, and the gaps such questions fall into (unanswered.py). The first column of the index
# is there to be equal: within it rows are in order of time. A gap lives as long as its questions do.
GAPS = """
ALTER TABLE queries ADD COLUMN signals INTEGER NOT NULL DEFAULT 0;
ALTER TABLE feedback ADD COLUMN handoff INTEGER NOT NULL DEFAULT 0;
CREATE INDEX queries_by_signals ON queries (bot) WHERE signals <> 0;
CREATE TABLE gaps (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  status TEXT NOT NULL,
  question TEXT NOT NULL,
  embedder TEXT NOT NULL,
  vector BLOB NOT NULL,
  test TEXT NOT NULL,
  nearest TEXT NOT NULL,
  evidence TEXT NOT NULL,
  reason TEXT NOT NULL,
  opened_ms INTEGER NOT NULL
);
CREATE TABLE gap_questions (
  seq INTEGER PRIMARY KEY,
  gap INTEGER NOT NULL
);
CREATE INDEX gap_questions_by_gap ON gap_questions (gap);
CREATE TABLE gap_events (
  gap INTEGER NOT NULL,
  at_ms INTEGER NOT NULL,
  status TEXT NOT NULL,
  detail TEXT NOT NULL
);
CREATE INDEX gap_events_by_gap ON gap_events (gap)
"""

# Crawlers are few: their list is short, and found without reading what people asked.
CRAWLERS = """
CREATE INDEX queries_by_bot ON queries (bot) WHERE bot = 1
"""

SEARCH_MS = """
ALTER TABLE queries ADD COLUMN search_ms INTEGER
"""

# What `mogine migrate` has brought from another record (move.py): by buckets of 70 minutes the keys of the
# rows there, what was thought of them, and whether they are here yet.
MOVED = """
CREATE TABLE moved (
  bucket INTEGER PRIMARY KEY,
  copied INTEGER NOT NULL,
  seqs BLOB NOT NULL,
  marks TEXT NOT NULL
)
"""

# Append only: a step that has been released is never edited, a change of the tables is a new step.
STEPS: tuple[tuple[str, str], ...] = (
    ("001_first_tables", FIRST_TABLES),
    ("002_rollups", ROLLUPS),
    ("003_gaps", GAPS),
    ("004_crawlers", CRAWLERS),
    ("005_search_ms", SEARCH_MS),
    ("006_moved", MOVED),
)
