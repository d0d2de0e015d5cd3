//! Reading and writing cookies, strictly (RFC 6265bis).

use http::header::{COOKIE, HeaderMap, HeaderValue, SET_COOKIE};

/// Most cookie pairs looked at; browsers send at most about 180 a site.
const MAX_PAIRS: usize = 256;

/// All `name=value` pairs of a request, in order. HTTP/2 may spread them over several fields
/// (RFC 9113 §8.2.3).
pub(crate) fn pairs(headers: &HeaderMap) -> impl Iterator<Item = (&str, &str)> {
    headers
        .get_all(COOKIE)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(';'))
        .take(MAX_PAIRS)
        .filter_map(|pair| pair.trim().split_once('='))
}

/// The value of a cookie that must not come twice.
pub(crate) fn single<'a>(headers: &'a HeaderMap, name: &str) -> Result<Option<&'a str>, Twice> {
    let mut values = pairs(headers).filter(|(found, _)| *found == name).map(|(_, value)| value);
    match (values.next(), values.next()) {
        (_, Some(_)) => Err(Twice),
        (value, None) => Ok(value),
    }
}

/// A cookie came twice: two parsers could pick different ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Twice;

/// Takes cookies whose name begins with `prefix` out of a request; all others stay.
pub(crate) fn remove(headers: &mut HeaderMap, prefix: &str) {
    if !headers.contains_key(COOKIE) {
        return;
    }
    let kept: Vec<String> = headers
        .get_all(COOKIE)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(';'))
        .map(str::trim)
        .filter(|pair| !pair.is_empty() && !pair.starts_with(prefix))
        .map(str::to_owned)
        .collect();
    headers.remove(COOKIE);
    if !kept.is_empty()
        && let Ok(value) = HeaderValue::try_from(kept.join("; "))
    {
        headers.insert(COOKIE, value);
    }
}

/// Takes cookies that a service tries to set under a name of ours out of an answer: a service must not
/// be able to plant a session.
pub(crate) fn remove_set(headers: &mut HeaderMap, prefix: &str) {
    let ours = |value: &HeaderValue| {
        // A cookie without a name (`=name=value`) comes back from older browsers as `name=value`.
        let at = value.as_bytes().iter().position(|byte| !matches!(byte, b' ' | b'\t' | b'='));
        at.and_then(|at| value.as_bytes().get(at..)).is_some_and(|text| text.starts_with(prefix.as_bytes()))
    };
    if !headers.get_all(SET_COOKIE).iter().any(ours) {
        return;
    }
    let kept: Vec<HeaderValue> =
        headers.get_all(SET_COOKIE).iter().filter(|value| !ours(value)).cloned().collect();
    headers.remove(SET_COOKIE);
    for value in kept {
        headers.append(SET_COOKIE, value);
    }
}

/// A `Set-Cookie` with every protection. `Lax`: the login's redirect from the issuer must carry it.
pub(crate) fn set(name: &str, value: &str, max_age_seconds: Option<u64>) -> Option<HeaderValue> {
    let mut text = format!("{name}={value}; Secure; HttpOnly; SameSite=Lax; Path=/");
    if let Some(seconds) = max_age_seconds {
        text.push_str("; Max-Age=");
        text.push_str(&seconds.to_string());
    }
    let mut header = HeaderValue::try_from(text).ok()?;
    header.set_sensitive(true);
    Some(header)
}

/// Deletes a cookie.
pub(crate) fn clear(name: &str) -> Option<HeaderValue> {
    set(name, "", Some(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(cookies: &[&'static str]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for cookie in cookies {
            headers.append(COOKIE, HeaderValue::from_static(cookie));
        }
        headers
    }

    #[test]
    fn a_cookie_is_found_by_its_exact_name_and_only_once() {
        let one = headers(&["a=1; __Host-palisade=x=y", "b=2"]);
        assert_eq!(single(&one, "__Host-palisade"), Ok(Some("x=y")));
        assert_eq!(single(&one, "__host-palisade"), Ok(None));
        assert_eq!(single(&headers(&["a=1", "a=2"]), "a"), Err(Twice));
    }

    #[test]
    fn gateway_29_our_cookies_go_no_further_and_others_stay() {
        let mut request = headers(&["theme=dark; __Host-palisade=s; __Host-palisade-f-1=x", "lang=de"]);
        remove(&mut request, "__Host-palisade");
        assert_eq!(request.get(COOKIE).unwrap(), "theme=dark; lang=de");
        let mut only_ours = headers(&["__Host-palisade=s"]);
        remove(&mut only_ours, "__Host-palisade");
        assert!(only_ours.is_empty());
    }

    #[test]
    fn a_service_cannot_plant_a_session() {
        let mut answer = HeaderMap::new();
        answer.append(SET_COOKIE, HeaderValue::from_static(" __Host-palisade=stolen; Path=/; Secure"));
        answer.append(SET_COOKIE, HeaderValue::from_static(" = __Host-palisade=nameless; Path=/; Secure"));
        answer.append(SET_COOKIE, HeaderValue::from_static("basket=1"));
        remove_set(&mut answer, "__Host-palisade");
        assert_eq!(answer.get_all(SET_COOKIE).iter().collect::<Vec<_>>(), ["basket=1"]);
    }
}
