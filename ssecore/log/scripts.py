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

#: Starts each script, after `instance`, `prefix`, constants and `bound` (`max_bytes`). `trim` drops
#: the oldest rows that have expired, and returns first and size; `retain` does so for a topic, up to `taken` at least,
#: and returns whether it is empty. `safely` removes a stream that it can't read from `due`, unless Redis is full or
#: read-only.
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
local function charge(owner, known, cost)
  local more = cost - tonumber(known or 0)
  for _, account in ipairs(more == 0 and {} or owner == '' and {''} or {'', owner}) do
    if redis.call('HINCRBY', prefix .. 'bytes', account, num(more)) <= 0 then
      redis.call('HDEL', prefix .. 'bytes', account)
    end
  end
  return num(cost)
end
local function cost(first, last, size) return stream_bytes + size + event_bytes * (last - first + 1) end
local function retain(stream, now, taken)
  local f = get(stream, 'first', 'last', 'size', 'max_events', 'max_bytes', 'age_s', 'owner', 'cost')
  local before, last, size = tonumber(f[1]), tonumber(f[2]), tonumber(f[3])
  local first = math.max(before, last - (tonumber(f[4]) or math.huge) + 1, taken and taken + 1 or 0)
  first, size = trim(stream, first, last, size, tonumber(f[5]), tonumber(f[6]), tonumber(now))
  set(stream, 'first', num(first), 'size', num(size), 'cost', charge(f[7], f[8], cost(first, last, size)))
  if first > last and before <= last then set(stream, 'updated', now) end
  return first > last
end
local function delete(stream)
  local f = get(stream, 'owner', 'key', 'epochs', 'cost')
  redis.call('DEL', facts(stream), rows(stream), prefix .. 'touched:' .. stream)
  redis.call('ZREM', prefix .. 'open', stream)
  redis.call('ZREM', prefix .. 'due', stream)
  if not f[1] then return end
  charge(f[1], f[4], 0)
  redis.call('ZREM', prefix .. 'runs:' .. f[1], stream)
  if f[2] ~= '' then redis.call('HDEL', prefix .. 'keys', f[2]) end
  for name in string.gmatch(f[3], '([^ :]+):') do redis.call('HDEL', prefix .. 'epochs', name) end
  redis.call('PUBLISH', prefix .. 'appended:' .. stream, '0 0 2 - ')
end
-- `taken`: 32 rows, or the stream if it is closed, though they aren't due.
local function visit(stream, now, taken)
  if redis.call('EXISTS', facts(stream)) == 0 then return delete(stream) end
  local f, at, upto = get(stream, 'closed', 'kind', 'age_s', 'last'), nil, nil
  local age_s = tonumber(f[3]) or forever_s
  if taken and f[1] == '0' then
    local some = redis.call('XRANGE', rows(stream), '-', '+', 'COUNT', 32)
    upto = tonumber(some[1] and string.match(some[#some][1], '^%d+') or f[4])
  end
  if f[1] == '1' then
    at = taken and now or get(stream, 'updated')[1] + age_s
  elseif f[2] == 'topic' and retain(stream, now, upto) then
    at = get(stream, 'updated')[1] + empty_s
  elseif f[2] == 'topic' then
    local oldest = redis.call('XRANGE', rows(stream), '-', '+', 'COUNT', 1)[1]
    at = (oldest and tonumber(oldest[2][6]) or now) + age_s
  end
  if at and tonumber(at) <= tonumber(now) then
    delete(stream)
  elseif at then
    redis.call('ZADD', prefix .. 'due', string.format('%.6f', at), stream)
  else
    redis.call('ZREM', prefix .. 'due', stream)
  end
end
local function safely(...)
  local fine, why = pcall(visit, ...)
  if fine then return end
  local text = type(why) == 'table' and why.err or tostring(why)
  if string.find(text, 'OOM', 1, true) or string.find(text, 'READONLY', 1, true) then error(why, 0) end
  redis.call('ZREM', prefix .. 'due', (...))
end
local function make_room(many, now)
  if used('') <= bound then return 0 end
  local from = string.format('(%.6f', now + empty_s)
  local next = redis.call('ZRANGE', prefix .. 'due', from, '+inf', 'BYSCORE', 'LIMIT', 0, many)
  for _, stream in ipairs(next) do
    if used('') <= bound then return 0 end
    safely(stream, now, true)
  end
  return #next
end
local function limit(stream, keep)
  local events, bytes, age_s = string.match(keep, '(.*),(.*),(.*)')
  set(stream, 'max_events', events, 'max_bytes', bytes, 'age_s', age_s)
end
local function create(stream, epoch, kind, owner, key, now, meta, process, keep)
  make_room(4, now)
  if used('') > 1.1 * bound then return 'full' end
  if owner ~= '' and used(owner) > 1.1 * bound / owners then return 'share' end
  if redis.call('HSETNX', prefix .. 'epochs', epoch, stream) == 0 then return 'conflict' end
  redis.call('DEL', rows(stream))  -- of a stream whose facts alone were lost: its numbers are given again
  set(stream, 'kind', kind, 'owner', owner, 'key', key, 'created', now, 'updated', now, 'meta', meta, 'holder', process,
    'first', 1, 'last', 0, 'size', 0, 'closed', 0, 'epochs', epoch .. ':1', 'epoch', epoch, 'writer', epoch,
    'instance', instance, 'cost', charge(owner, 0, stream_bytes))
  limit(stream, keep)
  if key ~= '' then redis.call('HSET', prefix .. 'keys', key, stream) end
  if kind == 'run' then
    local order = redis.call('INCR', prefix .. 'count')
    redis.call('ZADD', prefix .. 'open', order, stream)
    redis.call('ZADD', prefix .. 'runs:' .. owner, order, stream)
  else
    redis.call('ZADD', prefix .. 'due', now, stream)
  end
end
local function open(stream, epoch, now, most)
  if redis.call('HSETNX', prefix .. 'epochs', epoch, stream) == 0 then return 'conflict' end
  local f, epochs = get(stream, 'epochs', 'first', 'last'), {}
  for one in string.gmatch(f[1] .. ' ' .. epoch .. ':' .. num(f[3] + 1), '%S+') do table.insert(epochs, one) end
  while #epochs > tonumber(most) and tonumber(string.match(epochs[2], ':(%d+)')) <= tonumber(f[2]) do
    redis.call('HDEL', prefix .. 'epochs', string.match(table.remove(epochs, 1), '[^:]+'))
  end
  set(stream, 'epochs', table.concat(epochs, ' '), 'epoch', epoch, 'updated', now, 'instance', instance)
end
"""
SCRIPTS: Final = {
    # stream, epoch, kind, owner, key (both '' or '=…'), now, meta, process, limits ('events,bytes,age')
    "create": """
local named = ARGV[5] ~= '' and redis.call('HGET', prefix .. 'keys', ARGV[5]) or ARGV[1]
if redis.call('EXISTS', facts(named)) == 1 then return whole(named) end
return create(unpack(ARGV)) or whole(ARGV[1])
""",
    # stream, epoch, now, most epochs, a mark of this call, '' or new limits
    "open": """
local stream, epoch, now, most, mark, keep = unpack(ARGV)
local f = get(stream, 'closed', 'kind', 'opened')
if not f[1] then return 'none' end
if f[1] == '1' then return 'closed' end
if f[3] == mark then return whole(stream) end
local refusal = open(stream, epoch, now, most)
if refusal then return refusal end
set(stream, 'writer', epoch, 'opened', mark)
if keep ~= '' then limit(stream, keep) end
if f[2] == 'topic' then
  retain(stream, now)
  redis.call('ZADD', prefix .. 'due', now, stream)
end
return whole(stream)
""",
    # process, number of the call (rule 2), now, most epochs, a new epoch; then of each batch: stream, epoch, close,
    # meta, events, ends, body, the least that `last` must be (rule 4), '' or the limits of a topic to create. The
    # message is: first, last, closed, process, nothing; earlier versions read any message as "more".
    "append": """
local process, number, now, most = prefix .. 'process:' .. ARGV[1], tonumber(ARGV[2]), ARGV[3], ARGV[4]
local known = redis.call('GET', process)
if known then
  known = cmsgpack.unpack(known)
  if known[1] == number then return known[2] end
  if known[1] > number then return 'late' end
end
local crowded = used('') > 1.1 * bound
local function look(stream)
  return get(stream, 'last', 'closed', 'writer', 'instance', 'first', 'size', 'kind', 'max_events', 'max_bytes',
    'age_s', 'epoch', 'owner', 'cost')
end
local function append(new, stream, epoch, closes, meta, events, ends, body, least, keep)
  local f, refusal = look(stream), nil
  if not f[1] and keep ~= '' then
    refusal = create(stream, new, 'topic', '', '', now, '{}', ARGV[1], keep)
    f = look(stream)
  end
  if refusal or not f[1] then return {refusal or 'none'} end
  if f[2] == '1' then return {'closed'} end
  if epoch ~= '' and f[3] ~= epoch then return {'fenced'} end  -- '': a topic's, whoever opened it
  if f[4] ~= instance then  -- rule 3. A run goes on with its writer. A topic's have to hear of it: they tell its ids.
    refusal = open(stream, new, now, most)
    if refusal then return {refusal} end
    f[11] = new
    if f[7] == 'topic' then
      set(stream, 'writer', new)
      if epoch ~= '' then return {'fenced'} end
    end
  end
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
    if first == from then redis.call('ZADD', prefix .. 'due', now, stream) end  -- it was empty, and due as such
    if tonumber(f[8]) then first = math.max(first, last - tonumber(f[8]) + 1) end
    if closes == '0' then first, size = trim(stream, first, last, size, tonumber(f[9]), age_s, tonumber(now)) end
  end
  set(stream, 'first', num(first), 'last', num(last), 'size', num(size), 'closed', closes, 'updated', now,
    'cost', charge(f[12], f[13], cost(first, last, size)))
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
for n = 6, #ARGV, 9 do
  local new = string.format('%s%03d', string.sub(ARGV[5], 1, 19), #answers)
  local fine, answer = pcall(append, new, unpack(ARGV, n, n + 8))
  if not fine then
    answer = {'failed', type(answer) == 'table' and answer.err or tostring(answer)}
    if string.find(answer[2], 'READONLY', 1, true) then return redis.error_reply(answer[2]) end
  end
  table.insert(answers, answer)
end
redis.pcall('SET', process, cmsgpack.pack({number, answers}), 'EX', remember_s)
return answers
""",
    # now, step: handles the streams that are due, then frees space over the bounds; returns how many streams it handled
    "upkeep": """
local due = redis.call('ZRANGE', prefix .. 'due', '-inf', ARGV[1], 'BYSCORE', 'LIMIT', 0, ARGV[2])
for _, stream in ipairs(due) do safely(stream, ARGV[1]) end
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
    # '' or an index, name
    "find": """
local stream = ARGV[1] == '' and ARGV[2] or redis.call('HGET', prefix .. ARGV[1], ARGV[2])
return stream and whole(stream) or {'', {}}
""",
    # index, last place, '' or a process: returns, newest first, all, or those that it holds and those of processes
    # without a lease
    "runs": """
local found, alive = {}, {[ARGV[3]] = 0}
for _, stream in ipairs(redis.call('ZRANGE', prefix .. ARGV[1], 0, ARGV[2], 'REV')) do
  local one = whole(stream)
  if not next(one[2]) then
    delete(stream)
    redis.call('ZREM', prefix .. ARGV[1], stream)
  elseif ARGV[3] == '' then
    table.insert(found, one)
  else
    local holder = redis.pcall('HGET', facts(stream), 'holder')
    holder = type(holder) == 'string' and holder or ''
    alive[holder] = alive[holder] or redis.call('EXISTS', prefix .. 'lease:' .. holder)
    if alive[holder] == 0 then table.insert(found, one) end
  end
end
return found
""",
    # max bytes of each; then stream, epoch, last, stream, …: returns of each that has changed since, or is closed, its
    # name, last, closed, the rows after that, and, if earlier rows may be lost, its facts
    "more": """
local function more(stream, epoch, after)
  local f = get(stream, 'epoch', 'last', 'closed', 'first')
  local last, known, found = tonumber(f[2]), false, {}
  if f[1] == epoch and last == after and f[3] == '0' then return nil end
  if f[1] ~= epoch or last < after then known = redis.call('HGETALL', facts(stream)) end
  if last and last > after then found = read(stream, num(math.max(after + 1, tonumber(f[4]))), tonumber(ARGV[1])) end
  return {stream, last or 0, f[3] or '0', found, known}
end
local news = {}
for n = 2, #ARGV, 3 do
  local fine, one = pcall(more, ARGV[n], ARGV[n + 1], tonumber(ARGV[n + 2]))
  if not fine then one = {ARGV[n], 0, '0', {}, {err = "ERR the stream's keys hold something else"}} end
  if one then table.insert(news, one) end
end
return news
""",
    # stream, command
    "call": """
local holder = get(ARGV[1], 'holder')[1]
if not holder then return 0 end
redis.call('RPUSH', prefix .. 'calls:' .. holder, ARGV[2] .. ' ' .. ARGV[1])
redis.call('EXPIRE', prefix .. 'calls:' .. holder, remember_s)
redis.call('PUBLISH', prefix .. 'called:' .. holder, '')
return 1
""",
}
