"""The Lua that Redis runs for `serve/fleet.py`: each script is one step that nobody can come between.

Times are microseconds by Redis' own clock, the only one that all machines share; amounts are billionths of a
CNY, whole numbers that can be added without end. A script's own arguments begin at ARGV[4].
"""

from hashlib import sha1

_NOW = """
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local function text(number) return string.format('%.0f', number) end
"""
# ARGV 1 to 3: prefix, life, milliseconds of a lease.
_LIFE = """
local prefix, life, lease_ms = ARGV[1], ARGV[2], tonumber(ARGV[3])
local alive, open, visitors = prefix .. 'alive', prefix .. 'open:' .. life, prefix .. 'visitors:' .. life
local function renew()
  redis.call('ZADD', alive, text(now + lease_ms * 1000), life)
  redis.call('PEXPIRE', open, lease_ms)
  redis.call('PEXPIRE', visitors, lease_ms)
end
local function enter(ticket, visitor)
  redis.call('HSET', open, ticket, visitor)
  redis.call('HINCRBY', visitors, visitor, 1)
end
"""
# What is known of vendors: `open:NAME` until it is tried again, `rest:DIGEST` of a key until it rests no
# more. `news` gives field, microseconds left, and 1 for a vendor that whoever asks may try now: nobody else
# may then for as long as a trial may take.
_VENDORS = """
local vendors, KEPT_MS = prefix .. 'vendors', 3600000
local function news(trial_us, longest_us, wanted)
  local told, found = {}, redis.call('HGETALL', vendors)
  for place = 1, #found, 2 do
    local field, left = found[place], found[place + 1] - now
    local is_open = string.sub(field, 1, 5) == 'open:'
    -- A clock that was set back leaves nobody alone for longer than was meant.
    if left > (is_open and trial_us or longest_us) then left = 0 end
    if left > 0 then
      table.insert(told, {field, text(left), 0})
    elseif not is_open then
      redis.call('HDEL', vendors, field)
    elseif wanted[field] then
      redis.call('HSET', vendors, field, text(now + trial_us))
      redis.call('PEXPIRE', vendors, KEPT_MS)
      table.insert(told, {field, '0', 1})
    else
      table.insert(told, {field, '0', 0})
    end
  end
  return told
end
"""
# The amounts of a period by home: what this one has spent, and what all others have.
_SUMS = """
local function sums(keys, home)
  local told = {}
  for place, key in ipairs(keys) do
    local own, others, found = 0, 0, redis.call('HGETALL', key)
    for index = 1, #found, 2 do
      if found[index] == home then own = found[index + 1] else others = others + found[index + 1] end
    end
    told[place] = {tostring(own), text(others)}
  end
  return told
end
"""
# KEYS: rate of the visitor, rate of the site, then the periods of a budget. ARGV from 4: ticket, visitor,
# streams in all, streams per visitor, home, microseconds of a trial and of the longest rest, then three
# lists, each with its length before it: vendors that may be asked, rates of the visitor, rates of the site
# (count and seconds, each). Returns a verdict, microseconds to wait, sums of the periods, news of vendors.
ADMIT = (
    _NOW
    + _LIFE
    + _VENDORS
    + _SUMS
    + """
local ticket, visitor = ARGV[4], ARGV[5]
local place = 11
local function list()
  local first = place + 1
  place = first + ARGV[place]
  return first, place - 1
end
local wanted, from, upto = {}, list()
for index = from, upto do wanted['open:' .. ARGV[index]] = true end
local visitor_from, visitor_upto = list()
local site_from, site_upto = list()

-- A clock that was set back would keep the dead alive: nobody's lease ends that late.
redis.call('ZREMRANGEBYSCORE', alive, '-inf', text(now))
redis.call('ZREMRANGEBYSCORE', alive, text(now + 2000 * lease_ms), '+inf')
local all, own = 0, 0
for _, one in ipairs(redis.call('ZRANGE', alive, 0, -1)) do
  all = all + redis.call('HLEN', prefix .. 'open:' .. one)
  own = own + (redis.call('HGET', prefix .. 'visitors:' .. one, visitor) or 0)
end
if all >= tonumber(ARGV[6]) then return {1, 0} end
if own >= tonumber(ARGV[7]) then return {2, 0} end

local function wait(key, from, upto)
  local longest, most, left = 0, 0, 0
  local last = redis.call('LINDEX', key, -1)
  if last and tonumber(last) > now then redis.call('DEL', key) end
  for index = from, upto, 2 do
    local count, window = tonumber(ARGV[index]), ARGV[index + 1] * 1000000
    local taken = redis.call('LINDEX', key, -count)
    if taken then left = math.max(left, window - (now - taken)) end
    longest, most = math.max(longest, window), math.max(most, count)
  end
  return left, longest, most
end
local function take(key, longest, most)
  redis.call('RPUSH', key, text(now))
  redis.call('LTRIM', key, -most, -1)
  redis.call('PEXPIRE', key, text(longest / 1000))
end
local left, longest, most = wait(KEYS[1], visitor_from, visitor_upto)
if left > 0 then return {3, left} end
local site_left, site_longest, site_most = wait(KEYS[2], site_from, site_upto)
if site_left > 0 then return {4, site_left} end
take(KEYS[1], longest, most)
take(KEYS[2], site_longest, site_most)
enter(ticket, visitor)
renew()
local periods = {}
for index = 3, #KEYS do periods[index - 2] = KEYS[index] end
return {0, 0, sums(periods, ARGV[8]), news(tonumber(ARGV[9]), tonumber(ARGV[10]), wanted)}
"""
)
# ARGV from 4: tickets.
LEAVE = (
    _NOW
    + _LIFE
    + """
for place = 4, #ARGV do
  local visitor = redis.call('HGET', open, ARGV[place])
  if visitor then
    redis.call('HDEL', open, ARGV[place])
    if redis.call('HINCRBY', visitors, visitor, -1) <= 0 then redis.call('HDEL', visitors, visitor) end
  end
end
"""
)
# ARGV from 4: tickets and visitors, in pairs. For what began while Redis was away.
ENTER = (
    _NOW
    + _LIFE
    + """
for place = 4, #ARGV, 2 do enter(ARGV[place], ARGV[place + 1]) end
renew()
"""
)
# ARGV from 4: the name of the memory, microseconds of a trial and of the longest rest. Returns 0 when this is
# another memory, else 1 and news of vendors.
RENEW = (
    _NOW
    + _LIFE
    + _VENDORS
    + """
if redis.call('GET', prefix .. 'memory') ~= ARGV[4] then return {0} end
if not redis.call('ZSCORE', alive, life) then return {0} end
renew()
return {1, news(tonumber(ARGV[5]), tonumber(ARGV[6]), {})}
"""
)
END = (
    _NOW
    + _LIFE
    + """
redis.call('ZREM', alive, life)
redis.call('DEL', open, visitors)
"""
)
# ARGV 4: a name for this memory, if it has none yet. Returns the one that it has: another than before means
# that everything was forgotten in between.
MEMORY = """
redis.call('SET', ARGV[1] .. 'memory', ARGV[4], 'NX')
return redis.call('GET', ARGV[1] .. 'memory')
"""
# KEYS: the rate of one visitor, or of the site. ARGV from 4: how many moments are kept, milliseconds of the
# longest window, then how many microseconds ago questions were taken that this list may not know.
RECALL = (
    _NOW
    + """
local moments = redis.call('LRANGE', KEYS[1], 0, -1)
for place = 6, #ARGV do table.insert(moments, text(now - ARGV[place])) end
table.sort(moments, function(one, other) return tonumber(one) < tonumber(other) end)
redis.call('DEL', KEYS[1])
for place = math.max(1, #moments - ARGV[4] + 1), #moments do redis.call('RPUSH', KEYS[1], moments[place]) end
redis.call('PEXPIRE', KEYS[1], ARGV[5])
"""
)
# KEYS: periods. ARGV from 4: home, seconds to keep, amount.
SPEND = """
for _, key in ipairs(KEYS) do
  redis.call('HINCRBY', key, ARGV[4], ARGV[6])
  redis.call('EXPIRE', key, ARGV[5])
end
"""
# KEYS: periods. ARGV from 4: seconds to keep, then for each period how many arguments follow for it: homes
# and what each has spent at least. Amounts only grow, so of two the greater is right. Returns all there are.
SPENT = """
local place, told = 5, {}
for index, key in ipairs(KEYS) do
  local first = place + 1
  place = first + ARGV[place]
  for at = first, place - 1, 2 do
    local known = redis.call('HGET', key, ARGV[at])
    if not known or tonumber(known) < tonumber(ARGV[at + 1]) then
      redis.call('HSET', key, ARGV[at], ARGV[at + 1])
    end
  end
  redis.call('EXPIRE', key, ARGV[4])
  told[index] = redis.call('HGETALL', key)
end
return told
"""
# ARGV from 4: what is known of a vendor or a key, and for how many microseconds.
KNOW = (
    _NOW
    + _LIFE
    + _VENDORS
    + """
redis.call('HSET', vendors, ARGV[4], text(now + ARGV[5]))
redis.call('PEXPIRE', vendors, KEPT_MS)
"""
)
# ARGV from 4: what is true no longer.
FORGET = "redis.call('HDEL', ARGV[1] .. 'vendors', ARGV[4])"

# A conversation: KEYS are its turns, and its visitor. ARGV from 4: who asks.
# Returns 0 when there is none, 1 and the turns when it is theirs, 2 when it is somebody else's.
TALK = """
local visitor = redis.call('GET', KEYS[2])
if not visitor then return {0} end
if visitor ~= ARGV[4] then return {2} end
return {1, unpack(redis.call('LRANGE', KEYS[1], 0, -1))}
"""
# KEYS as above. ARGV from 4: visitor, the new turn, how many turns are kept, for how many seconds, and of how
# many conversations at all.
TURN = (
    _NOW
    + """
local visitor, talks = redis.call('GET', KEYS[2]), ARGV[1] .. 'talks'
if visitor and visitor ~= ARGV[4] then return end
redis.call('SET', KEYS[2], ARGV[4], 'EX', ARGV[7])
redis.call('RPUSH', KEYS[1], ARGV[5])
redis.call('LTRIM', KEYS[1], -ARGV[6], -1)
redis.call('EXPIRE', KEYS[1], ARGV[7])
redis.call('ZADD', talks, text(now), KEYS[1])
redis.call('EXPIRE', talks, ARGV[7])
redis.call('ZREMRANGEBYSCORE', talks, '-inf', text(now - ARGV[7] * 1000000))
if redis.call('ZCARD', talks) > tonumber(ARGV[8]) then
  for _, oldest in ipairs(redis.call('ZPOPMIN', talks)) do
    redis.call('DEL', oldest, oldest .. ':visitor')
  end
end
"""
)
# KEYS: what a vendor calls a conversation. ARGV from 4: the visitor that it was given to, seconds to keep.
NOTE = "redis.call('SET', KEYS[1], ARGV[4], 'NX', 'EX', ARGV[5])"
# KEYS as above. ARGV from 4: who asks. 0 when it was given to somebody else.
ALLOWS = """
local owner = redis.call('GET', KEYS[1])
return (not owner or owner == ARGV[4]) and 1 or 0
"""
# KEYS: the salt of a day. ARGV from 4: a proposal, seconds to keep. Returns the one that all use.
SALT = """
redis.call('SET', KEYS[1], ARGV[4], 'NX', 'EX', ARGV[5])
return redis.call('GET', KEYS[1])
"""

ALL = (
    *(ADMIT, LEAVE, ENTER, RENEW, END, MEMORY, RECALL, SPEND, SPENT, KNOW, FORGET),
    *(TALK, TURN, NOTE, ALLOWS, SALT),
)
SHA = {script: sha1(script.encode(), usedforsecurity=False).hexdigest() for script in ALL}
