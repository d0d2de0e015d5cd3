//! Which request targets are looked at, and where a login may lead back to.

use http::Uri;

/// Longest target accepted, query included.
pub const MAX_TARGET_BYTES: usize = 8 * 1024;

/// Refuses targets that two parsers could read differently. The same rules hold at every sidecar, so what
/// passes here is judged there as it was meant. Returns the rule that is broken.
pub fn check(uri: &Uri) -> Result<(), &'static str> {
    let path = uri.path();
    let length = uri.path_and_query().map_or(0, |target| target.as_str().len());
    if length > MAX_TARGET_BYTES {
        return Err("target.too_long");
    }
    if !path.starts_with('/') {
        return Err("target.form");
    }
    check_path(path)
}

fn check_path(path: &str) -> Result<(), &'static str> {
    if path.contains("//") {
        return Err("target.empty_segment");
    }
    if path.split('/').any(|segment| segment == "." || segment == "..") {
        return Err("target.dot_segment");
    }
    for byte in path.bytes() {
        match byte {
            b'%' => return Err("target.percent"),
            b';' => return Err("target.parameter"),
            b'\\' => return Err("target.backslash"),
            0x21..=0x7e => {}
            _ => return Err("target.byte"),
        }
    }
    Ok(())
}

/// Whether a query carries an access token (RFC 6750 §2.3, which OAuth 2.1 has taken out).
pub fn has_token(uri: &Uri) -> bool {
    let query = uri.query().unwrap_or_default();
    url::form_urlencoded::parse(query.as_bytes()).any(|(name, _)| name.eq_ignore_ascii_case("access_token"))
}

/// A place on this site to come back to after a login: an absolute path, never another host. Anything
/// else becomes the front page.
pub fn local(return_to: &str) -> &str {
    let path = return_to.split(['?', '#']).next().unwrap_or_default();
    // Browsers read a backslash as a slash and drop tabs and line ends: none of them may be here at all.
    let plain = return_to.bytes().all(|byte| matches!(byte, 0x21..=0x7e) && byte != b'\\');
    let fits = return_to.len() <= MAX_TARGET_BYTES && path.starts_with('/') && !return_to.contains('#');
    if plain && fits && check_path(path).is_ok() && !path.starts_with(crate::OWN_PREFIX) {
        return_to
    } else {
        "/"
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn paths_that_two_parsers_could_read_differently_are_refused() {
        let rule = |target: &str| check(&target.parse().unwrap());
        assert_eq!(rule("/accounts/42?x=%2e%2e"), Ok(()));
        assert_eq!(rule("/"), Ok(()));
        assert_eq!(rule("//accounts"), Err("target.empty_segment"));
        assert_eq!(rule("/accounts//42"), Err("target.empty_segment"));
        assert_eq!(rule("/./a"), Err("target.dot_segment"));
        assert_eq!(rule("/a/.."), Err("target.dot_segment"));
        assert_eq!(rule("/a/%2e%2e/b"), Err("target.percent"));
        assert_eq!(rule("/a%2fb"), Err("target.percent"));
        assert_eq!(rule("/a;x=y"), Err("target.parameter"));
        assert_eq!(rule("*"), Err("target.form"));
        assert_eq!(rule(&format!("/{}", "a".repeat(MAX_TARGET_BYTES))), Err("target.too_long"));
        assert_eq!(check_path("/a\\b"), Err("target.backslash"));
        assert_eq!(check_path("/a\u{e4}"), Err("target.byte"));
    }

    #[test]
    fn gateway_16_a_token_in_the_query_is_seen_however_it_is_written() {
        for target in ["/?access_token=x", "/a?b=c&access_token=x", "/?access%5Ftoken=x", "/?Access_Token=x"]
        {
            assert!(has_token(&target.parse().unwrap()), "{target}");
        }
        assert!(!has_token(&"/?q=access_token".parse().unwrap()));
    }

    #[test]
    fn gateway_28_a_login_leads_back_to_this_site_only() {
        for good in ["/", "/accounts/17", "/accounts?sort=a&b=%2F"] {
            assert_eq!(local(good), good);
        }
        for bad in [
            "//evil.example",
            "/\\evil.example",
            "https://evil.example",
            "evil",
            "",
            "/\t/evil.example",
            "/a/../..//b",
            "/\u{2f}/evil",
            "javascript:alert(1)",
            "/a#b",
            "/.palisade/login",
            "/%2f%2fevil.example",
            "\\\\evil",
        ] {
            assert_eq!(local(bad), "/", "{bad}");
        }
    }

    proptest! {
        #[test]
        fn gateway_28_whatever_is_accepted_stays_on_the_same_origin(text in "[/\\\\a.:@?#% \t]{0,12}") {
            let base = url::Url::parse("https://gateway.example/x").unwrap();
            let joined = base.join(local(&text)).unwrap();
            prop_assert_eq!(joined.origin(), base.origin());
        }
    }
}
