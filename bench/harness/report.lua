-- The end of a wrk run as one line of JSON. Latencies are microseconds.
function done(summary, latency, requests)
  local e = summary.errors
  io.write(string.format(
    '\n{"requests":%d,"seconds":%.6f,"p50":%.1f,"p90":%.1f,"p99":%.1f,"non2xx":%d,"socket_errors":%d,"bytes":%d}\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50), latency:percentile(90),
    latency:percentile(99), e.status, e.connect + e.read + e.write + e.timeout, summary.bytes))
end
