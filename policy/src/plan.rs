//! A route, resolved once: which places of a request are looked at, and what becomes of their values.

use std::collections::BTreeMap;

use smallvec::SmallVec;
use smol_str::{SmolStr, SmolStrBuilder};

use crate::body::{Member, Members};
use crate::map::{Claim, Source};
use crate::object::AttributeType;
use crate::schema::ObjectType;
use crate::template::{ObjectTemplate, PathTemplate, Piece, Place};

/// What a route does with a request, without a name left to be looked up.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    /// Every place that names an object or tells an attribute, once.
    places: Vec<Place>,
    /// Where each of them is found.
    pub(crate) taken: SmallVec<[Taken; 2]>,
    /// The ids of the objects.
    pub(crate) ids: SmallVec<[Id; 1]>,
    /// Who tells each attribute of the objects' type, in the type's order.
    pub(crate) attributes: SmallVec<[Told; 2]>,
}

/// Where a value of a request is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Taken {
    /// The path's n-th capture.
    Capture(usize),
    /// The n-th of the listed query parameters.
    Query(usize),
    /// A member of the body.
    Body,
}

/// Who tells an attribute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Told {
    /// The request, at the n-th place.
    Request(usize),
    User(Claim),
    /// The service's `relations.toml`.
    Relations,
    /// The relations that are written by API.
    Stored,
    /// The app, in one way or the other.
    App,
    Nobody,
}

/// The id of an object, with places by number.
#[derive(Debug, Clone)]
pub(crate) struct Id {
    pieces: SmallVec<[IdPiece; 1]>,
    /// The list by whose values there is one object each.
    pub(crate) list: Option<ListPlace>,
}

/// A place with a list.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ListPlace {
    pub(crate) place: usize,
    /// Whether it may name no object, because another is named in any case.
    pub(crate) optional: bool,
}

#[derive(Debug, Clone)]
enum IdPiece {
    Text(String),
    Value(usize),
    /// A value that may be missing: there is nothing at its place then.
    Maybe(usize),
}

impl Plan {
    /// INVARIANT: every place is one that the route has; [`crate::map`] has said so of each.
    pub(crate) fn new(
        path: &PathTemplate,
        query: &[String],
        members: &Members,
        objects: &[ObjectTemplate],
        kind: &ObjectType,
        sources: &BTreeMap<String, (Source, AttributeType)>,
    ) -> Self {
        let mut plan = Self {
            places: Vec::new(),
            taken: SmallVec::new(),
            ids: SmallVec::new(),
            attributes: SmallVec::new(),
        };
        let mut number = |place: &Place| {
            plan.places.iter().position(|known| known == place).unwrap_or_else(|| {
                plan.taken.push(match place {
                    Place::Path(name) => Taken::Capture(
                        path.captures().position(|(captured, _)| captured == name).unwrap_or(usize::MAX),
                    ),
                    Place::Query(name) => {
                        Taken::Query(query.iter().position(|listed| listed == name).unwrap_or(usize::MAX))
                    }
                    Place::Body(_) | Place::First(_) => Taken::Body,
                });
                plan.places.push(place.clone());
                plan.places.len() - 1
            })
        };
        for object in objects {
            let mut list = None;
            let pieces = object.pieces().iter().map(|piece| match piece {
                Piece::Text(text) => IdPiece::Text(text.clone()),
                Piece::Value(at) => {
                    let place = number(at);
                    match at.member().and_then(|name| members.get(name)) {
                        Some(Member { many: true, optional, .. }) => {
                            list = Some(ListPlace { place, optional: *optional });
                            IdPiece::Value(place)
                        }
                        Some(Member { optional: true, .. }) => IdPiece::Maybe(place),
                        _ => IdPiece::Value(place),
                    }
                }
            });
            let pieces = pieces.collect();
            plan.ids.push(Id { pieces, list });
        }
        for name in kind.attributes.keys() {
            plan.attributes.push(match sources.get(name) {
                Some((Source::Request(place), _)) => Told::Request(number(place)),
                Some((Source::Claim(claim), _)) => Told::User(*claim),
                Some((Source::Relations, _)) => Told::Relations,
                Some((Source::Stored, _)) => Told::Stored,
                Some((Source::Entities | Source::Response(_), _)) => Told::App,
                None => Told::Nobody,
            });
        }
        plan
    }

    /// The number of a place.
    pub(crate) fn position(&self, place: &Place) -> Option<usize> {
        self.places.iter().position(|known| known == place)
    }

    /// Every place, in the order of their numbers.
    pub(crate) fn places(&self) -> &[Place] {
        &self.places
    }
}

impl Id {
    /// The id, once every place has a value but for those that need none.
    pub(crate) fn fill(&self, value: impl Fn(usize) -> Option<SmolStr>) -> Option<SmolStr> {
        if let [IdPiece::Value(place)] = self.pieces.as_slice() {
            return value(*place);
        }
        let mut id = SmolStrBuilder::new();
        for piece in &self.pieces {
            match piece {
                IdPiece::Text(text) => id.push_str(text),
                IdPiece::Value(place) => id.push_str(&value(*place)?),
                IdPiece::Maybe(place) => id.push_str(&value(*place).unwrap_or_default()),
            }
        }
        Some(id.finish())
    }
}
