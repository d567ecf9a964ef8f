"""The Lua scripts of the Redis log (see the rules in `redis`). Each changes all or nothing.

Keys, after the prefix: `facts:<stream>` (hash), `rows:<stream>` (a Redis stream of rows, each with its last sequence as
id), `touched:<stream>`; `lease:<process>`, `calls:<process>` (commands), `process:<process>` (its last answer); the
indexes `epochs` and `keys` (to the stream), `open` and `runs:<owner>` (by `count`, the order of creation), `due` (by
the next upkeep), and `bytes` (by owner, and in total as '').
Channels: `appended:<stream>`, `called:<process>`.
Facts: those of `Stat`, `epoch` (the newest), `writer` (the epoch that may append), `instance` (of the last append),
`holder`, `told` (another process answers for it), `cost` (in `bytes`).

Over several streams, one that can't be read is an error in its place.
"""

from typing import Final

__all__ = ["COMMON", "SCRIPTS"]

#: Starts each script, after `instance`, `prefix`, constants and `bound` (`max_bytes`). `trim` applies
#: `ssecore.log.facts.has_expired` to the oldest rows, and returns first and size. `safely` removes a stream that it
#: can't read from `due`, unless Redis is full or read-only.
COMMON: Final = """
local function num(n) return string.format('%.0f', n) end
local function facts(stream) return prefix .. 'facts:' .. stream end
local function rows(stream) return prefix .. 'rows:' .. stream end
local function get(stream, ...) return redis.call('HMGET', facts(stream), ...) end
local function set(stream, ...) redis.call('HSET', facts(stream), ...) end
local function whole(stream) return {stream, redis.pcall('HGETALL', facts(stream))} end
local function read(stream, from, max_bytes)
  local found, size = {}, 0
  repeat
    local some = redis.call('XRANGE', rows(stream), from, '+', 'COUNT', 16)
    for _, row in ipairs(some) do
      table.insert(found, row)
      size = size + #(row[2][8] or '')
      if size >= max_bytes then return found end
      from = '(' .. row[1]
    end
  until #some < 16
  return found
end
local function trim(stream, first, last, size, max_bytes, age_s, now)
  local cut = nil
  while true do
    local oldest = redis.call('XRANGE', rows(stream), cut and num(cut + 1) or '-', '+', 'COUNT', 1)[1]
    if not oldest then break end
    local row, at, bytes = tonumber(string.match(oldest[1], '^%d+')), tonumber(oldest[2][6]) or 0, #(oldest[2][8] or '')
    if not (row < first or (max_bytes and size > max_bytes and row < last) or (age_s and at + age_s <= now)) then
      break
    end
    size, cut, first = size - bytes, row, math.max(first, row + 1)
  end
  if cut then redis.call('XTRIM', rows(stream), 'MINID', num(cut + 1)) end
  return first, size
end
local function used(owner) return tonumber(redis.call('HGET', prefix .. 'bytes', owner) or 0) end
local function charge(stream, owner, known, cost)
  if cost == known then return end
  for _, account in ipairs(owner == '' and {''} or {'', owner}) do
    if redis.call('HINCRBY', prefix .. 'bytes', account, num(cost - known)) <= 0 then
      redis.call('HDEL', prefix .. 'bytes', account)
    end
  end
end
local function recharge(stream, first, last, size)
  local f, cost = get(stream, 'owner', 'cost'), stream_bytes + size + event_bytes * (last - first + 1)
  charge(stream, f[1], tonumber(f[2] or 0), cost)
  set(stream, 'first', num(first), 'last', num(last), 'size', num(size), 'cost', num(cost))
end
local function delete(stream)
  local f = get(stream, 'owner', 'key', 'epochs', 'cost')
  redis.call('DEL', facts(stream), rows(stream), prefix .. 'touched:' .. stream)
  redis.call('ZREM', prefix .. 'open', stream)
  redis.call('ZREM', prefix .. 'due', stream)
  if not f[1] then return end
  charge(stream, f[1], tonumber(f[4] or 0), 0)
  redis.call('ZREM', prefix .. 'runs:' .. f[1], stream)
  if f[2] ~= '' then redis.call('HDEL', prefix .. 'keys', f[2]) end
  for name in string.gmatch(f[3], '([^ :]+):') do redis.call('HDEL', prefix .. 'epochs', name) end
  redis.call('PUBLISH', prefix .. 'appended:' .. stream, '0 0 2 - ')
end
local function safely(work, stream, now)
  local fine, why = pcall(work, stream, now)
  if fine then return end
  local text = type(why) == 'table' and why.err or tostring(why)
  if string.find(text, 'OOM', 1, true) or string.find(text, 'READONLY', 1, true) then error(why, 0) end
  redis.call('ZREM', prefix .. 'due', stream)
end
local function take(stream, now)
  local f = get(stream, 'last', 'size', 'closed')
  if f[3] ~= '0' then return delete(stream) end
  local some, last = redis.call('XRANGE', rows(stream), '-', '+', 'COUNT', 32), tonumber(f[1])
  local after = some[1] and tonumber(string.match(some[#some][1], '^%d+')) or last
  local first, size = trim(stream, after + 1, last, tonumber(f[2]), nil, nil, tonumber(now))
  recharge(stream, first, last, size)
  if first > last then set(stream, 'updated', now) end
  redis.call('ZADD', prefix .. 'due', now, stream)
end
local function make_room(many, now)
  if used('') <= bound then return 0 end
  local from = string.format('(%.6f', now + empty_s)
  local next = redis.call('ZRANGE', prefix .. 'due', from, '+inf', 'BYSCORE', 'LIMIT', 0, many)
  for _, stream in ipairs(next) do
    if used('') <= bound then return 0 end
    safely(take, stream, now)
  end
  return #next
end
"""
SCRIPTS: Final = {
    # stream, epoch, kind, owner, key (both '' or '=…'), now, meta, process, limits: events, bytes, age
    "create": """
local stream, epoch, kind, owner, key, now, meta, process, max_events, max_bytes, age_s = unpack(ARGV)
local named = key ~= '' and redis.call('HGET', prefix .. 'keys', key) or stream
if redis.call('EXISTS', facts(named)) == 1 then return whole(named) end
make_room(4, now)
if used('') > 1.1 * bound then return 'full' end
if owner ~= '' and used(owner) > 1.1 * bound / owners then return 'share' end
if redis.call('HSETNX', prefix .. 'epochs', epoch, stream) == 0 then return 'conflict' end
redis.call('DEL', rows(stream))  -- of a stream whose facts alone were lost: its numbers are given again
set(stream, 'kind', kind, 'owner', owner, 'key', key, 'created', now, 'updated', now, 'meta', meta, 'holder', process,
  'first', 1, 'last', 0, 'size', 0, 'closed', 0, 'epochs', epoch .. ':1', 'epoch', epoch, 'writer', epoch,
  'instance', instance, 'max_events', max_events, 'max_bytes', max_bytes, 'age_s', age_s)
recharge(stream, 1, 0, 0)
if key ~= '' then redis.call('HSET', prefix .. 'keys', key, stream) end
if kind == 'run' then
  local order = redis.call('INCR', prefix .. 'count')
  redis.call('ZADD', prefix .. 'open', order, stream)
  redis.call('ZADD', prefix .. 'runs:' .. owner, order, stream)
else
  redis.call('ZADD', prefix .. 'due', now, stream)
end
return whole(stream)
""",
    # stream, epoch, now, a mark of this call or '' (the instance has changed), most epochs, then '' or a new retention:
    # events, bytes, age
    "open": """
local stream, epoch, now, mark = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4]
local f = get(stream, 'closed', 'first', 'last', 'epochs', 'size', 'kind', 'instance', 'opened')
if not f[1] then return 'none' end
if f[1] == '1' then return 'closed' end
if (mark ~= '' and f[8] == mark) or (mark == '' and f[7] == instance) then return whole(stream) end
if redis.call('HSETNX', prefix .. 'epochs', epoch, stream) == 0 then return 'conflict' end
local first, last, size = tonumber(f[2]), tonumber(f[3]), tonumber(f[5])
local names, starts = {}, {}
for name, start in string.gmatch(f[4] .. ' ' .. epoch .. ':' .. num(last + 1), '([^ :]+):(%d+)') do
  table.insert(names, name)
  table.insert(starts, tonumber(start))
end
local at = 1
while #names - at + 1 > tonumber(ARGV[5]) and starts[at + 1] <= first do
  redis.call('HDEL', prefix .. 'epochs', names[at])
  at = at + 1
end
local kept = {}
for n = at, #names do table.insert(kept, names[n] .. ':' .. num(starts[n])) end
set(stream, 'epochs', table.concat(kept, ' '), 'epoch', epoch, 'updated', ARGV[3], 'instance', instance, 'opened', mark)
-- A run goes on with its writer. A topic's writers have to hear of the epoch: they tell its ids.
if mark ~= '' or f[6] == 'topic' then set(stream, 'writer', epoch) end
if ARGV[6] then set(stream, 'max_events', ARGV[6], 'max_bytes', ARGV[7], 'age_s', ARGV[8]) end
if f[6] == 'topic' then
  local r = get(stream, 'max_events', 'max_bytes', 'age_s')
  if tonumber(r[1]) then first = math.max(first, last - tonumber(r[1]) + 1) end
  first, size = trim(stream, first, last, size, tonumber(r[2]), tonumber(r[3]), now)
  recharge(stream, first, last, size)
  redis.call('ZADD', prefix .. 'due', ARGV[3], stream)
end
return whole(stream)
""",
    # process, number of the call (rule 2), now, seconds to keep the answer; then of each batch: stream, epoch, close,
    # meta, events, ends, body, the least that `last` must be (rule 4). The message is: first, last, closed, process,
    # nothing; earlier versions read any message as "more".
    "append": """
local process, number, now = prefix .. 'process:' .. ARGV[1], tonumber(ARGV[2]), ARGV[3]
local known = redis.call('GET', process)
if known then
  known = cmsgpack.unpack(known)
  if known[1] == number then return known[2] end
  if known[1] > number then return 'late' end
end
local crowded = used('') > 1.1 * bound
local function append(stream, epoch, closes, meta, events, ends, body, least)
  local f = get(stream, 'last', 'closed', 'writer', 'instance', 'first', 'size', 'kind', 'max_events', 'max_bytes',
    'age_s', 'epoch', 'owner', 'cost')
  if not f[1] then return {'none'} end
  if f[2] == '1' then return {'closed'} end
  if epoch ~= '' and f[3] ~= epoch then return {'fenced'} end  -- '': a topic's, whoever opened it
  if f[4] ~= instance then return {'instance'} end
  local last = tonumber(f[1])
  if last < tonumber(least) then return {'lost'} end
  if events == '0' and closes == '0' and meta == '' then return {'ok', f[1], f[11]} end
  if crowded and events ~= '0' and closes == '0' then return {'full'} end
  local from, first, size, age_s = last + 1, tonumber(f[5]), tonumber(f[6]), tonumber(f[10])
  if first <= last and redis.call('EXISTS', rows(stream)) == 0 then  -- the rows alone are lost
    if tonumber(least) > 0 then return {'lost'} end
    first, size = from, 0
  end
  if events ~= '0' then
    last = last + tonumber(events)
    size = size + #body
    redis.call('XADD', rows(stream), num(last) .. '-0', 'e', f[11], 'n', ends, 't', now, 'b', body)
  end
  if f[7] == 'topic' then
    if tonumber(f[8]) then first = math.max(first, last - tonumber(f[8]) + 1) end
    if closes == '0' then first, size = trim(stream, first, last, size, tonumber(f[9]), age_s, tonumber(now)) end
  end
  local cost = stream_bytes + size + event_bytes * (last - first + 1)
  charge(stream, f[12], tonumber(f[13] or 0), cost)
  set(stream, 'first', num(first), 'last', num(last), 'size', num(size), 'closed', closes, 'updated', now,
    'cost', num(cost))
  if meta ~= '' then set(stream, 'meta', meta) end
  if closes == '1' then
    redis.call('ZREM', prefix .. 'open', stream)
    redis.call('ZADD', prefix .. 'due', string.format('%.6f', tonumber(now) + (age_s or forever_s)), stream)
  end
  if events ~= '0' or closes == '1' then
    redis.call('PUBLISH', prefix .. 'appended:' .. stream,
      table.concat({num(from), num(last), closes, ARGV[1], ''}, ' '))
  end
  return {'ok', num(last), f[11]}
end
local answers = {}
for n = 5, #ARGV, 8 do
  local fine, answer = pcall(append, unpack(ARGV, n, n + 7))
  if not fine then
    answer = {'failed', type(answer) == 'table' and answer.err or tostring(answer)}
    if string.find(answer[2], 'READONLY', 1, true) then return redis.error_reply(answer[2]) end
  end
  table.insert(answers, answer)
end
redis.pcall('SET', process, cmsgpack.pack({number, answers}), 'EX', ARGV[4])
return answers
""",
    # now, step: handles the streams that are due, then frees space over the bounds; returns how many streams it handled
    "upkeep": """
local now = tonumber(ARGV[1])
local function look(stream)
  if redis.call('EXISTS', facts(stream)) == 0 then return delete(stream) end
  local f = get(stream, 'first', 'last', 'size', 'closed', 'kind', 'max_bytes', 'age_s', 'updated')
  local last, age_s, updated, at = tonumber(f[2]), tonumber(f[7]) or forever_s, tonumber(f[8]), nil
  if f[4] == '1' then
    at = updated + age_s
  elseif f[5] == 'topic' then
    local first, size = trim(stream, tonumber(f[1]), last, tonumber(f[3]), tonumber(f[6]), age_s, now)
    if first > last and tonumber(f[1]) <= last then
      updated = now
      set(stream, 'updated', ARGV[1])
    end
    recharge(stream, first, last, size)
    if first > last then
      at = updated + empty_s
    else
      local oldest = redis.call('XRANGE', rows(stream), '-', '+', 'COUNT', 1)[1]
      at = (oldest and tonumber(oldest[2][6]) or now) + age_s
    end
  end
  if at and at <= now then
    delete(stream)
  elseif at then
    redis.call('ZADD', prefix .. 'due', string.format('%.6f', at), stream)
  else
    redis.call('ZREM', prefix .. 'due', stream)
  end
end
local due = redis.call('ZRANGE', prefix .. 'due', '-inf', ARGV[1], 'BYSCORE', 'LIMIT', 0, ARGV[2])
for _, stream in ipairs(due) do safely(look, stream) end
if bound == math.huge then return #due end
local accounts, taken = redis.call('HGETALL', prefix .. 'bytes'), 0
for n = 1, #accounts, 2 do
  local owner, share = accounts[n], bound / owners
  if owner ~= '' and tonumber(accounts[n + 1]) > share then
    for _, stream in ipairs(redis.call('ZRANGE', prefix .. 'runs:' .. owner, 0, 4 * ARGV[2])) do
      if taken >= tonumber(ARGV[2]) or used(owner) <= share then break end
      if redis.pcall('HGET', facts(stream), 'closed') == '1' then
        delete(stream)
        taken = taken + 1
      end
    end
  end
end
return math.max(#due, taken, make_room(tonumber(ARGV[2]), ARGV[1]))
""",
    # stream
    "mark_answered": """
if redis.call('EXISTS', facts(ARGV[1])) == 0 then return 0 end
set(ARGV[1], 'told', 1)
return 1
""",
    # stream, whether to keep it if `told` is set
    "delete": """
if ARGV[2] == '1' and get(ARGV[1], 'told')[1] then return 0 end
delete(ARGV[1])
return 1
""",
    # stream, after, bytes
    "read": """
local first = tonumber(get(ARGV[1], 'first')[1])
return first and read(ARGV[1], num(math.max(tonumber(ARGV[2]) + 1, first)), tonumber(ARGV[3])) or {}
""",
    # stream
    "stat": "return whole(ARGV[1])",
    # index, name
    "find": """
local stream = redis.call('HGET', prefix .. ARGV[1], ARGV[2])
return stream and whole(stream) or {'', {}}
""",
    # owner, limit
    "runs": """
local found = {}
for _, stream in ipairs(redis.call('ZRANGE', prefix .. 'runs:' .. ARGV[1], 0, ARGV[2], 'REV')) do
  local one = whole(stream)
  if next(one[2]) then table.insert(found, one) else redis.call('ZREM', prefix .. 'runs:' .. ARGV[1], stream) end
end
return found
""",
    # process: returns the open runs that it holds, and those of processes without a lease
    "left": """
local left, alive = {}, {[ARGV[1]] = 0}
for _, stream in ipairs(redis.call('ZRANGE', prefix .. 'open', 0, -1)) do
  local holder = redis.pcall('HGET', facts(stream), 'holder')
  if redis.call('EXISTS', facts(stream)) == 0 then
    delete(stream)
  else
    holder = type(holder) == 'string' and holder or ''
    alive[holder] = alive[holder] or redis.call('EXISTS', prefix .. 'lease:' .. holder)
    if alive[holder] == 0 then table.insert(left, whole(stream)) end
  end
end
return left
""",
    # stream, epoch, last, stream, epoch, last, …: returns the streams that have changed since, or are closed
    "news": """
local news = {}
for n = 1, #ARGV, 3 do
  local f = redis.pcall('HMGET', facts(ARGV[n]), 'epoch', 'last', 'closed')
  if f[1] ~= ARGV[n + 1] or f[2] ~= ARGV[n + 2] or f[3] == '1' then table.insert(news, ARGV[n]) end
end
return news
""",
    # max bytes of each; then stream, epoch, last, stream, …: returns of each its name, last, closed, the rows after
    # that, and, if earlier rows may be lost, its facts
    "more": """
local function more(stream, epoch, after)
  local f = get(stream, 'epoch', 'last', 'closed', 'first')
  local last, known, found = tonumber(f[2]), false, {}
  if f[1] ~= epoch or last < after then known = redis.call('HGETALL', facts(stream)) end
  if last and last > after then found = read(stream, num(math.max(after + 1, tonumber(f[4]))), tonumber(ARGV[1])) end
  return {stream, f[2] or '0', f[3] or '0', found, known}
end
local news = {}
for n = 2, #ARGV, 3 do
  local fine, one = pcall(more, ARGV[n], ARGV[n + 1], tonumber(ARGV[n + 2]))
  if not fine then one = {ARGV[n], '0', '0', {}, {err = "ERR the stream's keys hold something else"}} end
  table.insert(news, one)
end
return news
""",
    # stream, command, seconds to keep it
    "call": """
local holder = get(ARGV[1], 'holder')[1]
if not holder then return 0 end
redis.call('RPUSH', prefix .. 'calls:' .. holder, ARGV[2] .. ' ' .. ARGV[1])
redis.call('EXPIRE', prefix .. 'calls:' .. holder, ARGV[3])
redis.call('PUBLISH', prefix .. 'called:' .. holder, '')
return 1
""",
}
