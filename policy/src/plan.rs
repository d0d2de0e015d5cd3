//! A route, resolved once: which places of a request are looked at, and what becomes of their values.

use std::collections::BTreeMap;

use smallvec::SmallVec;
use smol_str::{SmolStr, SmolStrBuilder};

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
    /// The service's relations.
    Relations,
    /// The app, in one way or the other.
    App,
    Nobody,
}

/// The id of an object, with places by number.
#[derive(Debug, Clone)]
pub(crate) struct Id(SmallVec<[IdPiece; 1]>);

#[derive(Debug, Clone)]
enum IdPiece {
    Text(String),
    Value(usize),
}

impl Plan {
    /// INVARIANT: every place is one that the route has; [`crate::map`] has said so of each.
    pub(crate) fn new(
        path: &PathTemplate,
        query: &[String],
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
                    Place::Body(_) => Taken::Body,
                });
                plan.places.push(place.clone());
                plan.places.len() - 1
            })
        };
        for object in objects {
            let pieces = object.pieces().iter().map(|piece| match piece {
                Piece::Text(text) => IdPiece::Text(text.clone()),
                Piece::Value(place) => IdPiece::Value(number(place)),
            });
            plan.ids.push(Id(pieces.collect()));
        }
        for name in kind.attributes.keys() {
            plan.attributes.push(match sources.get(name) {
                Some((Source::Request(place), _)) => Told::Request(number(place)),
                Some((Source::Claim(claim), _)) => Told::User(*claim),
                Some((Source::Relations, _)) => Told::Relations,
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

    /// For each place the member of the body that it is, if it is one.
    pub(crate) fn body_members(&self) -> impl Iterator<Item = Option<&str>> {
        self.places.iter().map(|place| match place {
            Place::Body(name) => Some(name.as_str()),
            Place::Path(_) | Place::Query(_) => None,
        })
    }
}

impl Id {
    /// The places that it is made of.
    pub(crate) fn places(&self) -> impl Iterator<Item = usize> {
        self.0.iter().filter_map(|piece| match piece {
            IdPiece::Value(place) => Some(*place),
            IdPiece::Text(_) => None,
        })
    }

    /// The id, once every place has a value.
    pub(crate) fn fill(&self, value: impl Fn(usize) -> Option<SmolStr>) -> Option<SmolStr> {
        if let [IdPiece::Value(place)] = self.0.as_slice() {
            return value(*place);
        }
        let mut id = SmolStrBuilder::new();
        for piece in &self.0 {
            match piece {
                IdPiece::Text(text) => id.push_str(text),
                IdPiece::Value(place) => id.push_str(&value(*place)?),
            }
        }
        Some(id.finish())
    }
}
