//! Path templates (`/accounts/{id:int}`) and object templates (`Account::"{id}"`).
//!
//! A path either has one spelling or is refused: nothing here normalises.

use std::fmt;
use std::ops::Range;

use smallvec::SmallVec;

/// Longest path looked at; a template has few segments and ids are short.
const MAX_PATH_BYTES: usize = 2048;
/// Longest single segment: an id, not a document.
pub(crate) const MAX_SEGMENT_BYTES: usize = 128;
/// Most segments; deeper paths are not what a service's routes look like.
const MAX_SEGMENTS: usize = 16;
/// Most parts of a key.
const MAX_KEY_PARTS: usize = 16;
/// Longest key: with a table before it, an id that records still hold whole.
const MAX_KEY_BYTES: usize = 1024;
/// Longest canonical integer: 2^53 - 1 has 16 digits.
const MAX_INT_DIGITS: usize = 15;

/// What a capture admits. Each admits one spelling of a value only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CaptureType {
    /// `{x:int}`: decimal digits without leading zero or sign, at most 15.
    Int,
    /// `{x:uuid}`: 8-4-4-4-12 hexadecimal digits in lower case.
    Uuid,
    /// `{x:slug}`: lower-case letters and digits in groups joined by single `-`.
    Slug,
    /// `{x}`: `[A-Za-z0-9._-]+`, neither beginning nor ending with a dot.
    Plain,
}

impl CaptureType {
    pub(crate) const NAMES: [&'static str; 3] = ["int", "uuid", "slug"];

    fn parse(name: &str) -> Option<Self> {
        match name {
            "int" => Some(Self::Int),
            "uuid" => Some(Self::Uuid),
            "slug" => Some(Self::Slug),
            _ => None,
        }
    }

    pub(crate) fn admits(self, text: &str) -> bool {
        if text.is_empty() || text.len() > MAX_SEGMENT_BYTES {
            return false;
        }
        match self {
            Self::Int => is_canonical_natural(text),
            Self::Uuid => is_uuid(text),
            Self::Slug => text.split('-').all(|part| !part.is_empty() && part.bytes().all(is_lower_or_digit)),
            Self::Plain => is_plain_id(text),
        }
    }

    /// Whether some text is admitted by both.
    fn meets(self, other: Self) -> bool {
        // Every UUID is a slug and plain, every integer a slug and plain, every slug plain.
        !matches!((self, other), (Self::Int, Self::Uuid) | (Self::Uuid, Self::Int))
    }
}

fn is_lower_or_digit(b: u8) -> bool {
    b.is_ascii_lowercase() || b.is_ascii_digit()
}

/// Decimal digits, no sign, no leading zero.
pub(crate) fn is_canonical_natural(text: &str) -> bool {
    let digits = !text.is_empty() && text.len() <= MAX_INT_DIGITS && text.bytes().all(|b| b.is_ascii_digit());
    digits && (text == "0" || !text.starts_with('0'))
}

fn is_uuid(text: &str) -> bool {
    let lengths = text.split('-').map(str::len);
    let hex = |b: u8| b == b'-' || b.is_ascii_digit() || matches!(b, b'a'..=b'f');
    lengths.eq([8, 4, 4, 4, 12]) && text.bytes().all(hex)
}

/// The form every object id from outside must have, whatever part of the request it comes from.
pub(crate) fn is_plain_id(text: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    !text.is_empty()
        && text.len() <= MAX_SEGMENT_BYTES
        && text.bytes().all(allowed)
        // Also rules out `.` and `..`; a trailing dot is lost by some readers.
        && !text.starts_with('.')
        && !text.ends_with('.')
}

/// A key of a store: parts, each with the form of an id, joined by single `/`.
///
/// Stores escape what else may stand in a part. An escaped key is none here: nothing is decoded, so nothing is decoded
/// otherwise than the app does it.
pub(crate) fn is_key(text: &str) -> bool {
    text.len() <= MAX_KEY_BYTES
        && text.split('/').count() <= MAX_KEY_PARTS
        && text.split('/').all(is_plain_id)
}

/// The first part of a key.
pub(crate) fn first_part(key: &str) -> &str {
    key.split('/').next().unwrap_or_default()
}

/// A member, capture or parameter name.
pub(crate) fn is_name(text: &str) -> bool {
    let rest = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    text.len() <= MAX_SEGMENT_BYTES
        && text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text.bytes().all(rest)
}

/// The way to a field of a message: names with dots between them.
pub(crate) fn is_field_path(text: &str) -> bool {
    text.len() <= MAX_SEGMENT_BYTES && text.split('.').all(is_name)
}

/// One segment of a path template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Segment {
    Literal(String),
    Capture { name: String, kind: CaptureType },
}

/// A parsed path template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PathTemplate {
    segments: Vec<Segment>,
}

/// What is wrong with a template, and where in it (bytes).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TemplateError {
    pub(crate) span: Range<usize>,
    pub(crate) message: String,
}

impl PathTemplate {
    /// The path, if it is one only.
    pub(crate) fn literal(&self) -> Option<String> {
        let segments = self.segments.iter().map(|segment| match segment {
            Segment::Literal(text) => Some(text.as_str()),
            Segment::Capture { .. } => None,
        });
        Some(format!("/{}", segments.collect::<Option<Vec<_>>>()?.join("/")))
    }

    pub(crate) fn parse(text: &str) -> Result<Self, TemplateError> {
        let fail = |span: Range<usize>, message: String| TemplateError { span, message };
        let whole = 0..text.len();
        let Some(rest) = text.strip_prefix('/') else {
            return Err(fail(whole, "a path begins with `/`".into()));
        };
        let mut segments: Vec<Segment> = Vec::new();
        if rest.is_empty() {
            return Ok(Self { segments });
        }
        let mut start = 1;
        for part in rest.split('/') {
            let span = start..start + part.len();
            let segment = Segment::parse(part).map_err(|message| fail(span.clone(), message))?;
            if let Segment::Capture { name, .. } = &segment
                && segments.iter().any(|s| matches!(s, Segment::Capture { name: other, .. } if other == name))
            {
                return Err(fail(span, format!("`{{{name}}}` is captured twice")));
            }
            segments.push(segment);
            start += part.len() + 1;
        }
        if segments.len() > MAX_SEGMENTS {
            return Err(fail(whole, format!("more than {MAX_SEGMENTS} segments")));
        }
        Ok(Self { segments })
    }

    pub(crate) fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// Name and type of every capture.
    pub(crate) fn captures(&self) -> impl Iterator<Item = (&str, CaptureType)> {
        self.segments.iter().filter_map(|segment| match segment {
            Segment::Capture { name, kind } => Some((name.as_str(), *kind)),
            Segment::Literal(_) => None,
        })
    }

    /// The captured values if the path, split by [`segments_of`], matches: what the tree of routes is held
    /// against.
    #[cfg(test)]
    pub(crate) fn matches<'t, 'p>(&'t self, path: &[&'p str]) -> Option<Vec<(&'t str, &'p str)>> {
        if path.len() != self.segments.len() {
            return None;
        }
        let mut captured = Vec::new();
        for (segment, text) in self.segments.iter().zip(path) {
            match segment {
                Segment::Literal(literal) if literal == text => {}
                Segment::Capture { name, kind } if kind.admits(text) => captured.push((name.as_str(), *text)),
                _ => return None,
            }
        }
        Some(captured)
    }

    /// Whether some path matches both.
    pub(crate) fn overlaps(&self, other: &Self) -> bool {
        self.segments.len() == other.segments.len()
            && self.segments.iter().zip(&other.segments).all(|pair| match pair {
                (Segment::Literal(a), Segment::Literal(b)) => a == b,
                (Segment::Literal(text), Segment::Capture { kind, .. })
                | (Segment::Capture { kind, .. }, Segment::Literal(text)) => kind.admits(text),
                (Segment::Capture { kind: a, .. }, Segment::Capture { kind: b, .. }) => a.meets(*b),
            })
    }
}

impl Segment {
    fn parse(part: &str) -> Result<Self, String> {
        let Some(inner) = part.strip_prefix('{').and_then(|p| p.strip_suffix('}')) else {
            check_segment(part).map_err(|flaw| flaw.to_string())?;
            return Ok(Self::Literal(part.to_owned()));
        };
        let (name, kind) = match inner.split_once(':') {
            None => (inner, CaptureType::Plain),
            Some((name, kind)) => {
                let known = CaptureType::NAMES.join(", ");
                (name, CaptureType::parse(kind).ok_or(format!("`{kind}` is not a capture type ({known})"))?)
            }
        };
        if !is_name(name) {
            return Err(format!("`{name}` is not a name: a letter, then letters, digits, `_`"));
        }
        Ok(Self::Capture { name: name.to_owned(), kind })
    }
}

/// What makes a request path other than canonical.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PathFlaw {
    NoSlash,
    TooLong,
    EmptySegment,
    DotSegment,
    Percent,
    Backslash,
    Semicolon,
    Character,
}

impl fmt::Display for PathFlaw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoSlash => "the path does not begin with `/`",
            Self::TooLong => "the path is too long or too deep",
            Self::EmptySegment => "the path has an empty segment (`//` or a trailing `/`)",
            Self::DotSegment => "the path has a segment `.` or `..`",
            Self::Percent => "the path is percent-encoded",
            Self::Backslash => "the path has a backslash",
            Self::Semicolon => "the path has a parameter (`;`)",
            Self::Character => "the path has a character other than A-Z a-z 0-9 - . _ ~ /",
        })
    }
}

/// Segments of a path, in place: there are few.
pub(crate) type Segments<'p> = SmallVec<[&'p str; MAX_SEGMENTS]>;

/// The segments of a canonical path; `/` has none.
pub(crate) fn segments_of(path: &str) -> Result<Segments<'_>, PathFlaw> {
    if path.len() > MAX_PATH_BYTES {
        return Err(PathFlaw::TooLong);
    }
    let rest = path.strip_prefix('/').ok_or(PathFlaw::NoSlash)?;
    if rest.is_empty() {
        return Ok(Segments::new());
    }
    let mut segments = Segments::new();
    for segment in rest.split('/') {
        check_segment(segment)?;
        if segments.len() == MAX_SEGMENTS {
            return Err(PathFlaw::TooLong);
        }
        segments.push(segment);
    }
    Ok(segments)
}

fn check_segment(segment: &str) -> Result<(), PathFlaw> {
    match segment {
        "" => return Err(PathFlaw::EmptySegment),
        "." | ".." => return Err(PathFlaw::DotSegment),
        _ if segment.len() > MAX_SEGMENT_BYTES => return Err(PathFlaw::TooLong),
        _ => {}
    }
    let flaw = segment.bytes().find_map(|b| match b {
        b'%' => Some(PathFlaw::Percent),
        b'\\' => Some(PathFlaw::Backslash),
        b';' => Some(PathFlaw::Semicolon),
        b'-' | b'.' | b'_' | b'~' => None,
        b if b.is_ascii_alphanumeric() => None,
        _ => Some(PathFlaw::Character),
    });
    flaw.map_or(Ok(()), Err)
}

/// A place in a request that a value is taken from.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Place {
    /// A capture of the path.
    Path(String),
    /// A query parameter.
    Query(String),
    /// A top-level member of the body, or of a gRPC message the way to a field, with dots.
    Body(String),
    /// The first part of such a member that is a key: no object is named by it, but an attribute told.
    First(String),
}

impl Place {
    /// The member of the body that it is or is a part of.
    pub(crate) fn member(&self) -> Option<&str> {
        match self {
            Self::Body(name) | Self::First(name) => Some(name),
            Self::Path(_) | Self::Query(_) => None,
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(name) => write!(f, "{{{name}}}"),
            Self::Query(name) => write!(f, "{{query:{name}}}"),
            Self::Body(name) => write!(f, "{{body:/{name}}}"),
            Self::First(name) => write!(f, "{{body:/{name}/0}}"),
        }
    }
}

/// One piece of an object's id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Piece {
    Text(String),
    Value(Place),
}

/// `Type::"id with {places}"`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ObjectTemplate {
    /// The type as written, with or without a namespace.
    pub(crate) kind: String,
    pieces: Vec<Piece>,
}

impl ObjectTemplate {
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let form = || "an object is written Type::\"id\", the id with {captures} as needed".to_owned();
        let (kind, rest) = text.split_once("::\"").ok_or_else(form)?;
        let id = rest.strip_suffix('"').ok_or_else(form)?;
        if kind.is_empty() || !kind.split("::").all(is_name) {
            return Err(format!("`{kind}` is not the name of an entity type"));
        }
        let mut pieces = Vec::new();
        let mut rest = id;
        while let Some((before, after)) = rest.split_once('{') {
            let (inner, after) = after.split_once('}').ok_or("`{` without `}`")?;
            if !before.is_empty() {
                pieces.push(Piece::Text(literal(before)?));
            }
            pieces.push(Piece::Value(place(inner)?));
            rest = after;
        }
        if !rest.is_empty() {
            pieces.push(Piece::Text(literal(rest)?));
        }
        if pieces.is_empty() {
            return Err("the id is empty".into());
        }
        check_separated(&pieces)?;
        Ok(Self { kind: kind.to_owned(), pieces })
    }

    pub(crate) fn places(&self) -> impl Iterator<Item = &Place> {
        self.pieces.iter().filter_map(|piece| match piece {
            Piece::Value(place) => Some(place),
            Piece::Text(_) => None,
        })
    }

    pub(crate) fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// INVARIANT: as [`check_separated`], where some values are keys. Read from the left, a value ends at the first
    /// character that it cannot hold, so whatever follows a key on the way to another value needs one.
    pub(crate) fn check_keys(&self, is_key: impl Fn(&Place) -> bool) -> Result<(), String> {
        for window in self.pieces.windows(3) {
            if let [Piece::Value(a), Piece::Text(between), Piece::Value(b)] = window
                && is_key(a)
                && between.split('/').all(is_plain_text)
            {
                return Err(format!(
                    "`{between}` does not keep the key {a} and {b} apart; use `:`, or put {a} last"
                ));
            }
        }
        Ok(())
    }
}

fn literal(text: &str) -> Result<String, String> {
    match text.chars().find(|c| matches!(c, '}' | '"' | '\\') || c.is_control()) {
        Some(bad) => Err(format!("`{}` cannot stand in an id here", bad.escape_default())),
        None => Ok(text.to_owned()),
    }
}

fn place(inner: &str) -> Result<Place, String> {
    let named = |name: &str, make: fn(String) -> Place| {
        if is_name(name) { Ok(make(name.to_owned())) } else { Err(format!("`{name}` is not a name")) }
    };
    match inner.split_once(':') {
        None => named(inner, Place::Path),
        Some(("query", name)) => named(name, Place::Query),
        Some(("body", pointer)) => match pointer.strip_prefix('/') {
            Some(path) if is_field_path(path) => Ok(Place::Body(path.to_owned())),
            Some(path) => Err(format!("`{path}` is not a name")),
            None => Err("a body member is written {body:/name}".into()),
        },
        Some((kind, _)) => {
            Err(format!("`{kind}:` is not a place; write {{capture}}, {{query:name}} or {{body:/name}}"))
        }
    }
}

/// INVARIANT: two different sets of values never make the same id. Between two values there stands a
/// character that no value can hold.
fn check_separated(pieces: &[Piece]) -> Result<(), String> {
    for window in pieces.windows(3) {
        if let [Piece::Value(a), Piece::Text(between), Piece::Value(b)] = window
            && is_plain_text(between)
        {
            return Err(format!("`{between}` does not keep {a} and {b} apart; use `/` or `:`"));
        }
    }
    for window in pieces.windows(2) {
        if let [Piece::Value(a), Piece::Value(b)] = window {
            return Err(format!("{a} and {b} run together; put `/` or `:` between them"));
        }
    }
    Ok(())
}

fn is_plain_text(text: &str) -> bool {
    text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn template(text: &str) -> PathTemplate {
        PathTemplate::parse(text).unwrap()
    }

    #[test]
    fn a_template_captures_what_its_types_admit() {
        let t = template("/accounts/{id:int}/history");
        assert_eq!(t.matches(&["accounts", "17", "history"]), Some(vec![("id", "17")]));
        for other in
            [&["accounts", "017", "history"][..], &["accounts", "17"], &["Accounts", "17", "history"]]
        {
            assert_eq!(t.matches(other), None, "{other:?}");
        }
        assert_eq!(template("/").matches(&[]), Some(vec![]));
    }

    #[test]
    fn policy_11_numbers_and_uuids_have_one_spelling() {
        for bad in ["042", "+42", " 42", "42 ", "-1", "4_2", "0x2a", "1e3", "٤٢", "", "9999999999999999"] {
            assert!(!CaptureType::Int.admits(bad), "{bad}");
        }
        assert!(CaptureType::Int.admits("0") && CaptureType::Int.admits("42"));
        assert!(CaptureType::Uuid.admits("0b0c4a0e-93c5-4a0e-8a33-0f6f2a3c1d9e"));
        for bad in [
            "0B0C4A0E-93C5-4A0E-8A33-0F6F2A3C1D9E",
            "0b0c4a0e93c54a0e8a330f6f2a3c1d9e",
            "{0b0c4a0e-93c5-4a0e-8a33-0f6f2a3c1d9e}",
            "0b0c4a0e-93c5-4a0e-8a33-0f6f2a3c1d9",
        ] {
            assert!(!CaptureType::Uuid.admits(bad), "{bad}");
        }
    }

    #[test]
    fn slugs_and_plain_ids() {
        for good in ["a", "a-b", "2026-q1"] {
            assert!(CaptureType::Slug.admits(good), "{good}");
        }
        for bad in ["A", "a--b", "-a", "a-", "a_b", "a.b"] {
            assert!(!CaptureType::Slug.admits(bad), "{bad}");
        }
        for bad in [".", "..", ".a", "a.", "a~b", "a b", "é", ""] {
            assert!(!CaptureType::Plain.admits(bad), "{bad}");
        }
        assert!(CaptureType::Plain.admits("a.B_c-9"));
    }

    #[test]
    fn keys_are_ids_joined_by_slashes() {
        for good in ["a", "alice/17", "a.b/-5/C_d", "1/2/3/4/5/6/7/8/9/10/11/12/13/14/15/16"] {
            assert!(is_key(good), "{good}");
            assert!(good.starts_with(first_part(good)) && is_plain_id(first_part(good)));
        }
        for bad in [
            "",
            "/",
            "/a",
            "a/",
            "a//b",
            "a/.",
            "a/..",
            "../a",
            "a/.b",
            "a./b",
            "a%2Fb",
            "a%25",
            "a b",
            "a\\b",
            "caf\u{e9}",
            "a/b\0",
            "a:b",
            "a*",
            "1/2/3/4/5/6/7/8/9/10/11/12/13/14/15/16/17",
        ] {
            assert!(!is_key(bad), "{bad:?}");
        }
        assert!(
            is_key(&vec!["a".repeat(102); 10].join("/")[..1024])
                && !is_key(&vec!["a".repeat(102); 10].join("/"))
        );
    }

    #[test]
    fn a_key_stands_last_or_before_what_it_cannot_hold() {
        let check = |text: &str| {
            ObjectTemplate::parse(text).unwrap().check_keys(|place| place.member() == Some("key"))
        };
        for good in [
            r#"Row::"{body:/table}/{body:/key}""#,
            r#"Row::"{body:/key}:{table}""#,
            r#"R::"{a}/{b}/{body:/key}/x""#,
        ] {
            assert_eq!(check(good), Ok(()), "{good}");
        }
        for bad in [r#"Row::"{body:/key}/{table}""#, r#"Row::"{body:/key}/x/{table}""#] {
            assert!(check(bad).unwrap_err().contains("apart"), "{bad}");
        }
    }

    #[test]
    fn policy_1_to_10_and_22_only_canonical_paths_have_segments() {
        let cases = [
            ("//accounts/2", PathFlaw::EmptySegment),
            ("/accounts//2", PathFlaw::EmptySegment),
            ("/accounts/2/", PathFlaw::EmptySegment),
            ("/accounts%2F2", PathFlaw::Percent),
            ("/accounts%5C2", PathFlaw::Percent),
            ("/accounts\\2", PathFlaw::Backslash),
            ("/accounts/../accounts/2", PathFlaw::DotSegment),
            ("/accounts/./2", PathFlaw::DotSegment),
            ("/accounts/%2e%2e/2", PathFlaw::Percent),
            ("/accounts/%252e", PathFlaw::Percent),
            ("/accounts/2;v=1", PathFlaw::Semicolon),
            ("/accounts/2%20", PathFlaw::Percent),
            ("/accounts/2%00", PathFlaw::Percent),
            ("/accounts/2\0", PathFlaw::Character),
            ("/accounts/2#frag", PathFlaw::Character),
            ("/accounts/２", PathFlaw::Character),
            ("/accounts/2\u{200b}", PathFlaw::Character),
            ("/accounts/caf\u{e9}", PathFlaw::Character),
            ("accounts", PathFlaw::NoSlash),
            ("bank.Accounts/Read", PathFlaw::NoSlash),
            ("//Read", PathFlaw::EmptySegment),
            ("", PathFlaw::NoSlash),
        ];
        for (path, flaw) in cases {
            assert_eq!(segments_of(path), Err(flaw), "{path:?}");
        }
    }

    #[test]
    fn templates_with_mistakes_say_where() {
        let at = |text: &str| PathTemplate::parse(text).unwrap_err();
        assert_eq!(at("accounts").span, 0..8);
        assert_eq!(at("/a/{id:integer}").span, 3..15);
        assert!(at("/a/{id:integer}").message.contains("int, uuid, slug"));
        assert_eq!(at("/{a}/{a}").span, 5..8);
        assert_eq!(at("/a//b").span, 3..3);
        assert!(at("/a/{9}").message.contains("not a name"));
        assert!(at("/a/x{id}").message.contains("character"));
    }

    #[test]
    fn object_templates_keep_their_values_apart() {
        let fill = |text: &str| {
            let template = ObjectTemplate::parse(text).unwrap();
            let piece = |piece: &Piece| match piece {
                Piece::Text(text) => text.clone(),
                Piece::Value(Place::Path(name)) => format!("<{name}>"),
                Piece::Value(Place::Query(name)) => format!("<?{name}>"),
                Piece::Value(Place::Body(name) | Place::First(name)) => format!("<body {name}>"),
            };
            template.pieces().iter().map(piece).collect::<String>()
        };
        assert_eq!(fill(r#"Account::"{id}""#), "<id>");
        assert_eq!(fill(r#"Row::"{table}/{key}""#), "<table>/<key>");
        assert_eq!(fill(r#"A::B::"x-{body:/from}""#), "x-<body from>");
        for bad in [
            "Account",
            "Account::id",
            "Account::\"\"",
            "::\"x\"",
            "A::\"{a}{b}\"",
            "A::\"{a}-{b}\"",
            "A::\"{a\"",
            "A::\"a}\"",
            "A::\"{header:x}\"",
            "A::\"{body:from}\"",
            "A::\"{body:/a/b}\"",
        ] {
            assert!(ObjectTemplate::parse(bad).is_err(), "{bad}");
        }
    }

    fn segment_text() -> impl Strategy<Value = String> {
        prop_oneof![
            "[a-z]{1,3}",
            "[0-9]{1,3}",
            "[a-zA-Z0-9._-]{1,6}",
            Just("0b0c4a0e-93c5-4a0e-8a33-0f6f2a3c1d9e".to_owned()),
        ]
    }

    fn template_segment() -> impl Strategy<Value = String> {
        prop_oneof![
            "[a-z]{1,2}",
            "[0-9]{1,2}",
            (0u8..9, prop_oneof![Just(""), Just(":int"), Just(":uuid"), Just(":slug")])
                .prop_map(|(n, kind)| format!("{{c{n}{kind}}}")),
        ]
    }

    fn path_template() -> impl Strategy<Value = PathTemplate> {
        proptest::collection::vec(template_segment(), 1..4).prop_filter_map("a capture twice", |parts| {
            PathTemplate::parse(&format!("/{}", parts.join("/"))).ok()
        })
    }

    proptest! {
        #[test]
        fn any_text_is_parsed_or_refused_and_never_normalised(path in "\\PC{0,24}|[/.%;a-z0-9~\\\\-]{0,24}") {
            if let Ok(segments) = segments_of(&path) {
                prop_assert_eq!(format!("/{}", segments.join("/")), path.as_str());
                prop_assert!(segments.iter().all(|s| !s.is_empty() && *s != "." && *s != ".."));
            }
        }

        #[test]
        fn parsing_a_template_never_panics(text in "\\PC{0,32}|[/{}:a-z0-9.]{0,32}") {
            let _unused = PathTemplate::parse(&text).map(|t| t.segments().len());
            let _unused = ObjectTemplate::parse(&text).map(|t| t.kind);
        }

        #[test]
        fn templates_that_do_not_overlap_never_match_one_path(
            a in path_template(),
            b in path_template(),
            path in proptest::collection::vec(segment_text(), 1..4),
        ) {
            let path: Vec<&str> = path.iter().map(String::as_str).collect();
            if a.matches(&path).is_some() && b.matches(&path).is_some() {
                prop_assert!(a.overlaps(&b) && b.overlaps(&a));
            }
        }

        /// Two requests that differ name two rows, whatever stands in their keys.
        #[test]
        fn a_table_and_a_key_make_one_id(
            one in ("[a/.]{0,4}", "[a/.]{0,5}"), other in ("[a/.]{0,4}", "[a/.]{0,5}"),
        ) {
            let good = |(table, key): &(String, String)| is_plain_id(table) && (key.is_empty() || is_key(key));
            let id = |(table, key): &(String, String)| format!("{table}/{key}");
            if good(&one) && good(&other) {
                prop_assert_eq!(id(&one) == id(&other), one == other);
            }
        }

        #[test]
        fn captures_rebuild_the_path(t in path_template(), path in proptest::collection::vec(segment_text(), 1..4)) {
            let path: Vec<&str> = path.iter().map(String::as_str).collect();
            if let Some(captured) = t.matches(&path) {
                for (_, value) in captured {
                    prop_assert!(path.contains(&value) && is_plain_id(value));
                }
            }
        }
    }
}
