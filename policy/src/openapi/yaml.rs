//! YAML 1.2 (and JSON, which is YAML) as a tree that knows where everything stands.
//!
//! Stricter than the language where its readers differ: one document, keys that are texts and appear once, no merge
//! keys. An alias is the node that it names, shared and not copied, as a key too, so no file is larger than it is long.

use std::collections::HashMap;
use std::rc::Rc;

use saphyr_parser::{Event, Marker, Parser, ScalarStyle, ScanError, Span};

use crate::record::cut;

/// Most nodes: the largest descriptions that companies publish have some hundred thousands.
pub(super) const MAX_NODES: usize = 1_000_000;
/// Deepest nesting: schemas that are written within one another reach some dozens.
const MAX_DEPTH: usize = 128;

/// Line and column, from 1, in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) line: usize,
    pub(super) column: usize,
}

impl Place {
    /// The byte of the text that stands there.
    pub(super) fn offset(self, text: &str) -> usize {
        let before: usize = text.split_inclusive('\n').take(self.line.saturating_sub(1)).map(str::len).sum();
        let rest = text.get(before..).unwrap_or_default();
        before + rest.char_indices().nth(self.column.saturating_sub(1)).map_or(rest.len(), |(at, _)| at)
    }
}

impl From<Marker> for Place {
    fn from(marker: Marker) -> Self {
        Self { line: marker.line(), column: marker.col() + 1 }
    }
}

/// What is wrong with a file, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Flaw {
    pub(super) at: Place,
    pub(super) message: String,
    pub(super) hint: Option<&'static str>,
}

impl Flaw {
    pub(super) fn new(at: Place, message: impl Into<String>) -> Self {
        Self { at, message: cut(&message.into()), hint: None }
    }

    pub(super) fn hint(mut self, hint: &'static str) -> Self {
        self.hint = Some(hint);
        self
    }
}

impl From<ScanError> for Flaw {
    fn from(error: ScanError) -> Self {
        Self::new((*error.marker()).into(), error.info())
    }
}

/// A value and where it begins.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) at: Place,
    pub(super) value: Value,
    /// How many lists and mappings there are within one another, aliases included.
    depth: usize,
}

#[derive(Debug)]
pub(super) enum Value {
    /// A text, a number, `true` or nothing, as it is written.
    Scalar(Rc<str>),
    Sequence(Vec<Rc<Node>>),
    Mapping(Mapping),
}

#[derive(Debug)]
pub(super) struct Mapping {
    members: Vec<Member>,
    /// Their places in order of their keys.
    by_key: Vec<usize>,
}

#[derive(Debug)]
pub(super) struct Member {
    pub(super) key: Rc<str>,
    pub(super) at: Place,
    pub(super) value: Rc<Node>,
}

impl Node {
    pub(super) fn members(&self, what: &str) -> Result<&[Member], Flaw> {
        match &self.value {
            Value::Mapping(mapping) => Ok(&mapping.members),
            Value::Scalar(_) | Value::Sequence(_) => Err(Flaw::new(self.at, format!("{what} is no mapping"))),
        }
    }

    pub(super) fn items(&self, what: &str) -> Result<&[Rc<Node>], Flaw> {
        match &self.value {
            Value::Sequence(items) => Ok(items),
            Value::Scalar(_) | Value::Mapping(_) => Err(Flaw::new(self.at, format!("{what} is no list"))),
        }
    }

    pub(super) fn text(&self, what: &str) -> Result<&str, Flaw> {
        match &self.value {
            Value::Scalar(text) => Ok(text),
            Value::Sequence(_) | Value::Mapping(_) => Err(Flaw::new(self.at, format!("{what} is no text"))),
        }
    }

    /// The member of that name, if this is a mapping that has one.
    pub(super) fn member(&self, key: &str) -> Option<&Member> {
        match &self.value {
            Value::Mapping(mapping) => mapping.get(key),
            Value::Scalar(_) | Value::Sequence(_) => None,
        }
    }

    /// Its value.
    pub(super) fn get(&self, key: &str) -> Option<&Rc<Node>> {
        self.member(key).map(|member| &member.value)
    }
}

impl Mapping {
    fn new(members: Vec<Member>) -> Result<Self, Flaw> {
        let mut named: Vec<(&str, usize)> = members.iter().map(|member| &*member.key).zip(0..).collect();
        named.sort_unstable();
        let again = named.windows(2).find_map(|two| match two {
            [(one, _), (other, at)] if one == other => members.get(*at),
            _ => None,
        });
        if let Some(again) = again {
            return Err(Flaw::new(again.at, format!("the key `{}` is there twice", again.key)));
        }
        let by_key = named.into_iter().map(|(_, at)| at).collect();
        Ok(Self { members, by_key })
    }

    fn get(&self, key: &str) -> Option<&Member> {
        let name = |at: &usize| self.members.get(*at).map_or("", |member| &*member.key);
        let found = self.by_key.binary_search_by(|at| name(at).cmp(key)).ok()?;
        self.members.get(*self.by_key.get(found)?)
    }
}

/// Reads a file's one document.
pub(super) fn parse(text: &str) -> Result<Rc<Node>, Flaw> {
    let mut building = Building::default();
    for event in Parser::new_from_str(text) {
        let (event, span) = event?;
        building.take(event, span)?;
    }
    building.document.ok_or_else(|| Flaw::new(Place { line: 1, column: 1 }, "the file is empty"))
}

/// A list or mapping that has begun and not ended.
struct Open {
    at: Place,
    anchor: usize,
    depth: usize,
    inside: Inside,
}

enum Inside {
    Sequence(Vec<Rc<Node>>),
    Mapping { members: Vec<Member>, key: Option<(Rc<str>, Place)> },
}

#[derive(Default)]
struct Building {
    open: Vec<Open>,
    anchors: HashMap<usize, Rc<Node>>,
    nodes: usize,
    document: Option<Rc<Node>>,
}

impl Building {
    fn take(&mut self, event: Event<'_>, span: Span) -> Result<(), Flaw> {
        let at = Place::from(span.start);
        match event {
            Event::Nothing | Event::StreamStart | Event::StreamEnd | Event::DocumentEnd => Ok(()),
            Event::DocumentStart(_) if self.document.is_some() => {
                Err(Flaw::new(at, "a second document begins here").hint("a description is one document"))
            }
            Event::DocumentStart(_) => Ok(()),
            Event::Alias(anchor) => {
                let inside_itself = || Flaw::new(at, "the alias names what it stands in");
                let node = self.anchors.get(&anchor).cloned().ok_or_else(inside_itself)?;
                self.add(at, node, false)
            }
            Event::Scalar(text, style, anchor, _) => {
                let node = Rc::new(Node { at, depth: 0, value: Value::Scalar((*text).into()) });
                self.anchor(anchor, &node);
                self.add(at, node, style == ScalarStyle::Plain)
            }
            Event::SequenceStart(anchor, _) => {
                self.open.push(Open { at, anchor, depth: 0, inside: Inside::Sequence(Vec::new()) });
                Ok(())
            }
            Event::MappingStart(anchor, _) => {
                let inside = Inside::Mapping { members: Vec::new(), key: None };
                self.open.push(Open { at, anchor, depth: 0, inside });
                Ok(())
            }
            Event::SequenceEnd | Event::MappingEnd => self.end(),
        }
    }

    fn end(&mut self) -> Result<(), Flaw> {
        let Some(Open { at, anchor, depth, inside }) = self.open.pop() else { return Ok(()) };
        // Whatever goes through a tree goes as deep, dropping it too.
        if depth == MAX_DEPTH {
            return Err(Flaw::new(at, format!("nested deeper than {MAX_DEPTH}")));
        }
        let value = match inside {
            Inside::Sequence(items) => Value::Sequence(items),
            Inside::Mapping { members, .. } => Value::Mapping(Mapping::new(members)?),
        };
        let node = Rc::new(Node { at, depth: depth + 1, value });
        self.anchor(anchor, &node);
        self.add(at, node, false)
    }

    fn anchor(&mut self, anchor: usize, node: &Rc<Node>) {
        // The parser counts anchors from 1; 0 is none.
        if anchor != 0 {
            self.anchors.insert(anchor, Rc::clone(node));
        }
    }

    /// Puts a node where it belongs: into what is open, as a key or as a value.
    fn add(&mut self, at: Place, node: Rc<Node>, is_plain: bool) -> Result<(), Flaw> {
        self.nodes += 1;
        if self.nodes > MAX_NODES {
            return Err(Flaw::new(at, format!("more than {MAX_NODES} values")));
        }
        let Some(open) = self.open.last_mut() else {
            self.document = Some(node);
            return Ok(());
        };
        open.depth = open.depth.max(node.depth);
        match &mut open.inside {
            Inside::Sequence(items) => items.push(node),
            Inside::Mapping { members, key } => match key.take() {
                Some((key, key_at)) => members.push(Member { key, at: key_at, value: node }),
                None => {
                    let Value::Scalar(name) = &node.value else {
                        return Err(Flaw::new(at, "the key is no text"));
                    };
                    if is_plain && **name == *"<<" {
                        return Err(Flaw::new(at, "merge keys (`<<`) are no part of YAML 1.2")
                            .hint("write out what is merged"));
                    }
                    *key = Some((Rc::clone(name), at));
                }
            },
        }
        Ok(())
    }
}
