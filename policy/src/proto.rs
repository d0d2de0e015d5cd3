//! gRPC messages that name objects: fields of a protobuf message, by the service's own `.proto` files.
//!
//! A message is read once, in its wire form and strictly: what two parsers of it could understand differently, or
//! what the app could know of it and we do not, is refused. The bytes themselves are passed on, never written anew.
//!
//! Source: Protocol Buffers, "Encoding" (protobuf.dev/programming-guides/encoding).

use std::collections::BTreeMap;
use std::sync::Arc;

use prost_reflect::prost::Message as _;
use prost_reflect::{DescriptorPool, DynamicMessage, FieldDescriptor, Kind, MessageDescriptor};
use protox::file::{ChainFileResolver, File, FileResolver, GoogleFileResolver};
use serde_json::Value as Json;
use smallvec::SmallVec;

use crate::body::{MAX_LIST, Member, MemberType, Members, Values, missing, wrong_list, wrong_type};
use crate::object::{AttributeValue, MAX_EXACT_INTEGER};
use crate::problem::suggest;

/// Longest field path: an id stands near the top of a message.
const MAX_DEPTH: usize = 8;
/// Bytes of the longest varint.
const MAX_VARINT_BYTES: usize = 10;

/// A `.proto` file: its name and its text.
#[derive(Clone, Copy)]
pub(crate) struct Source<'a> {
    pub(crate) name: &'a str,
    pub(crate) text: &'a str,
}

/// Compiles the files of one service; they import one another by their names, and Google's well-known types. The
/// error is of the file that [`at_fault`] says.
pub(crate) fn compile(sources: &[Source<'_>]) -> Result<DescriptorPool, protox::Error> {
    let mut resolver = ChainFileResolver::new();
    let named = sources.iter().map(|source| (imported_as(source.name, sources), source.text.to_owned()));
    resolver.add(Given(named.collect()));
    resolver.add(GoogleFileResolver::new());
    let mut compiler = protox::Compiler::with_file_resolver(resolver);
    compiler.include_imports(true);
    for source in sources {
        compiler.open_file(imported_as(source.name, sources))?;
    }
    Ok(compiler.descriptor_pool())
}

/// Which of the files an error is of.
pub(crate) fn at_fault(error: &protox::Error, sources: &[Source<'_>]) -> Option<usize> {
    let named = error.file()?;
    sources.iter().position(|source| imported_as(source.name, sources) == named)
}

/// What a file is called: as others import it, who may name the directory that it has elsewhere.
fn imported_as(name: &str, sources: &[Source<'_>]) -> String {
    let statements = sources.iter().flat_map(|source| source.text.split([';', '\n']));
    let imports = statements.filter(|statement| statement.trim_start().starts_with("import"));
    let mut imported = imports.filter_map(|statement| statement.split('"').nth(1));
    imported.find(|path| path.rsplit('/').next() == Some(name)).unwrap_or(name).to_owned()
}

struct Given(BTreeMap<String, String>);

impl FileResolver for Given {
    fn open_file(&self, name: &str) -> Result<File, protox::Error> {
        match self.0.get(name) {
            Some(text) => File::from_source(name, text),
            None => Err(protox::Error::file_not_found(name)),
        }
    }
}

/// The paths of all methods of the services here, in order.
pub(crate) fn methods(pool: &DescriptorPool) -> Vec<String> {
    let of = |service: prost_reflect::ServiceDescriptor| {
        let name = service.full_name().to_owned();
        service.methods().map(move |method| format!("/{name}/{}", method.name())).collect::<Vec<_>>()
    };
    let mut paths: Vec<String> = pool.services().flat_map(of).collect();
    paths.sort();
    paths
}

/// What one method's requests are.
#[derive(Debug, Clone)]
pub(crate) struct Call {
    pub(crate) message: Arc<Shape>,
    /// The client may send more than one.
    pub(crate) streams: bool,
}

impl Call {
    /// The method behind a path such as `/bank.Accounts/Read`, of whose message these members are read. Errors name the
    /// member, if it is one's.
    pub(crate) fn new(
        pool: &DescriptorPool,
        path: &str,
        members: &Members,
    ) -> Result<Self, (Option<String>, String)> {
        let (service, method) = path
            .strip_prefix('/')
            .and_then(|path| path.split_once('/'))
            .ok_or_else(|| (None, "a method of gRPC is /package.Service/Method".to_owned()))?;
        let found = pool.get_service_by_name(service).ok_or_else(|| {
            let services = pool.services().map(|service| service.full_name().to_owned()).collect::<Vec<_>>();
            let hint = suggest(service, services.iter().map(String::as_str));
            (None, with_hint(format!("the .proto files have no service `{service}`"), hint))
        })?;
        let called = found.methods().find(|known| known.name() == method).ok_or_else(|| {
            let methods = found.methods().map(|method| method.name().to_owned()).collect::<Vec<_>>();
            let hint = suggest(method, methods.iter().map(String::as_str));
            (None, with_hint(format!("the service `{service}` has no method `{method}`"), hint))
        })?;
        let wanted: Vec<Wanted<'_>> = members
            .iter()
            .map(|(name, member)| Wanted {
                name,
                path: name.split('.').collect(),
                member: *member,
                repeated: false,
            })
            .collect();
        let message = Shape::new(&called.input(), &wanted, 0).map_err(|(name, error)| (Some(name), error))?;
        Ok(Self { message: Arc::new(message), streams: called.is_client_streaming() })
    }
}

fn with_hint(message: String, hint: Option<String>) -> String {
    hint.map_or(message.clone(), |hint| format!("{message}; {hint}"))
}

/// A member, and what is left of the way to it.
#[derive(Clone)]
struct Wanted<'a> {
    name: &'a str,
    path: Vec<&'a str>,
    member: Member,
    /// The way has led through a repeated field.
    repeated: bool,
}

/// The fields of a message, of which some are read.
#[derive(Debug)]
pub(crate) struct Shape {
    name: String,
    descriptor: MessageDescriptor,
    /// By number.
    fields: Vec<Field>,
}

#[derive(Debug)]
struct Field {
    number: u32,
    name: String,
    wire: Wire,
    repeated: bool,
    /// Of a repeated one: its elements may come as one piece.
    packable: bool,
    oneof: Option<usize>,
    /// Whether absence is told apart from the default.
    presence: bool,
    taken: Taken,
    /// What is taken of each of its elements, if it is repeated.
    each: Option<Each>,
}

/// The members that are told once for each element of a repeated field: lists of one length.
#[derive(Debug)]
struct Each {
    members: Vec<String>,
    /// Whether there may be no element.
    optional: bool,
}

#[derive(Debug)]
enum Taken {
    Not,
    Value {
        member: String,
        kind: MemberType,
        optional: bool,
        scalar: Scalar,
        /// One of a list.
        many: bool,
    },
    Within(Shape),
}

/// How a value is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wire {
    Varint,
    Fixed64,
    Length,
    Fixed32,
    /// Deprecated before proto3, and read by nobody here.
    Group,
}

impl Wire {
    fn of(field: &FieldDescriptor) -> Self {
        match field.kind() {
            Kind::Double | Kind::Fixed64 | Kind::Sfixed64 => Self::Fixed64,
            Kind::Float | Kind::Fixed32 | Kind::Sfixed32 => Self::Fixed32,
            Kind::Message(_) if field.is_group() => Self::Group,
            Kind::String | Kind::Bytes | Kind::Message(_) => Self::Length,
            _ => Self::Varint,
        }
    }

    fn read(number: u64) -> Option<Self> {
        match number {
            0 => Some(Self::Varint),
            1 => Some(Self::Fixed64),
            2 => Some(Self::Length),
            5 => Some(Self::Fixed32),
            _ => None,
        }
    }
}

/// A type of which a member is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scalar {
    Text,
    Bool,
    Int32,
    Int64,
    Uint32,
    Uint64,
    Sint32,
    Sint64,
    Fixed32,
    Fixed64,
    Sfixed32,
    Sfixed64,
}

impl Scalar {
    fn of(kind: &Kind) -> Option<Self> {
        Some(match kind {
            Kind::String => Self::Text,
            Kind::Bool => Self::Bool,
            Kind::Int32 => Self::Int32,
            Kind::Int64 => Self::Int64,
            Kind::Uint32 => Self::Uint32,
            Kind::Uint64 => Self::Uint64,
            Kind::Sint32 => Self::Sint32,
            Kind::Sint64 => Self::Sint64,
            Kind::Fixed32 => Self::Fixed32,
            Kind::Fixed64 => Self::Fixed64,
            Kind::Sfixed32 => Self::Sfixed32,
            Kind::Sfixed64 => Self::Sfixed64,
            _ => return None,
        })
    }

    fn fits(self, kind: MemberType) -> bool {
        match kind {
            MemberType::Id | MemberType::Key | MemberType::Text => self == Self::Text,
            MemberType::Bool => self == Self::Bool,
            MemberType::Int => !matches!(self, Self::Text | Self::Bool),
        }
    }
}

impl Shape {
    fn new(
        message: &MessageDescriptor,
        wanted: &[Wanted<'_>],
        depth: usize,
    ) -> Result<Self, (String, String)> {
        let mut known: Vec<FieldDescriptor> = message.fields().collect();
        known.sort_by_key(FieldDescriptor::number);
        for Wanted { name, path, .. } in wanted {
            let first = path.first().copied().unwrap_or_default();
            if !known.iter().any(|field| field.name() == first) {
                let names: Vec<String> = known.iter().map(|field| field.name().to_owned()).collect();
                let hint = suggest(first, names.iter().map(String::as_str));
                let error = format!("the message {} has no field `{first}`", message.full_name());
                return Err(((*name).to_owned(), with_hint(error, hint)));
            }
        }
        let mut fields = Vec::with_capacity(known.len());
        for field in known {
            let mut below: Vec<Wanted<'_>> = wanted
                .iter()
                .filter(|wanted| wanted.path.first() == Some(&field.name()))
                .map(|wanted| Wanted {
                    path: wanted.path.get(1..).unwrap_or_default().to_vec(),
                    ..wanted.clone()
                })
                .collect();
            let each = if field.is_list() { Each::new(&field, &mut below)? } else { None };
            let taken = Self::taken(&field, &below, depth)?;
            // An `optional` field of proto3 is written as the only one of a oneof of its own.
            let oneof = field.containing_oneof().filter(|oneof| oneof.fields().len() > 1);
            fields.push(Field {
                number: field.number(),
                name: field.name().to_owned(),
                wire: Wire::of(&field),
                repeated: field.is_list() || field.is_map(),
                packable: field.is_list() && Wire::of(&field) != Wire::Length,
                oneof: oneof.and_then(|oneof| message.oneofs().position(|other| other == oneof)),
                presence: field.supports_presence(),
                taken,
                each,
            });
        }
        Ok(Self { name: message.full_name().to_owned(), descriptor: message.clone(), fields })
    }

    /// A message by its fields, in the JSON form of protobuf (ProtoJSON): for tests of policies. The error is for people.
    pub(crate) fn write(&self, fields: Json) -> Result<Vec<u8>, String> {
        let message = DynamicMessage::deserialize(self.descriptor.clone(), fields);
        let message = message.map_err(|error| format!("that is no {}: {error}", self.name))?;
        Ok(message.encode_to_vec())
    }

    fn taken(field: &FieldDescriptor, below: &[Wanted<'_>], depth: usize) -> Result<Taken, (String, String)> {
        let Some(first) = below.first() else { return Ok(Taken::Not) };
        let wrong = |message: String| Err((first.name.to_owned(), message));
        let name = field.full_name();
        if field.is_map() {
            return wrong(format!("{name} is a map: what is in it has no order and is not read"));
        }
        let way = |wanted: &Wanted<'_>| wanted.path.first().map(|further| (*further).to_owned());
        if !matches!(field.kind(), Kind::Message(_))
            && let Some((wanted, further)) = below.iter().find_map(|wanted| Some((wanted, way(wanted)?)))
        {
            let error = format!("{name} is no message and has no field `{further}`");
            return Err((
                wanted.name.to_owned(),
                with_hint(error, Some(format!("take out `{}`", wanted.name))),
            ));
        }
        match (field.kind(), first.path.as_slice()) {
            (Kind::Message(message), [_, ..]) => {
                if message.full_name() == "google.protobuf.Any" {
                    return wrong(format!("{name} may hold any message: what is in it cannot be judged"));
                }
                if field.is_group() || depth + 1 >= MAX_DEPTH {
                    return wrong(format!("{name} is a group, or lies too deep"));
                }
                if let Some(ends) = below.iter().find(|wanted| wanted.path.is_empty()) {
                    return Err((ends.name.to_owned(), format!("{name} is a message, not a value")));
                }
                Ok(Taken::Within(Self::new(&message, below, depth + 1)?))
            }
            (Kind::Message(_), []) => wrong(format!("{name} is a message, not a value")),
            (kind, _) => {
                let Member { kind: wanted, optional, many } = first.member;
                if many && !first.repeated {
                    return wrong(format!("{name} is one value: there is no list to be told"));
                }
                let scalar = Scalar::of(&kind).filter(|scalar| scalar.fits(wanted));
                let Some(scalar) = scalar else {
                    return wrong(format!("{name} is a {kind:?}, which is no {}", wanted.name()));
                };
                // The default of a text is no key, so what has no key has none for every reader.
                if optional && !many && !field.supports_presence() && wanted != MemberType::Key {
                    return wrong(format!("{name} is never missing: without a value it is its default"));
                }
                // A list without elements is one thing, an element without the value another.
                let optional = optional && !many;
                Ok(Taken::Value { member: first.name.to_owned(), kind: wanted, optional, scalar, many })
            }
        }
    }

    /// Reads one message. The error is for the operator.
    pub(crate) fn read(&self, message: &[u8]) -> Result<Values, String> {
        let mut values = Values::new();
        self.read_into(message, &mut values)?;
        Ok(values)
    }

    fn read_into(&self, message: &[u8], values: &mut Values) -> Result<(), String> {
        let mut input = Input(message);
        let (mut seen, mut chosen) = (SmallVec::<[u32; 16]>::new(), SmallVec::<[usize; 4]>::new());
        while !input.0.is_empty() {
            let tag = input.varint()?;
            let number = u32::try_from(tag >> 3).unwrap_or(u32::MAX);
            let field = self.field(number)?;
            if !field.repeated {
                if seen.contains(&number) {
                    return Err(format!("the field `{}` of {} appears twice", field.name, self.name));
                }
                seen.push(number);
                if let Some(oneof) = field.oneof {
                    if chosen.contains(&oneof) {
                        return Err(format!(
                            "`{}` of {} is not the only one of its oneof",
                            field.name, self.name
                        ));
                    }
                    chosen.push(oneof);
                }
            }
            let wire = Wire::read(tag & 7)
                .filter(|wire| *wire == field.wire || (field.packable && *wire == Wire::Length));
            let wire = wire.ok_or_else(|| {
                format!("the field `{}` of {} is written as another type", field.name, self.name)
            })?;
            self.read_value(field, wire, &mut input, values)?;
        }
        self.complete(&seen, values)
    }

    /// A message that was read, without the elements of its list that are not to be kept, by their place; every other byte
    /// is as it came. The list is a field of the message itself.
    pub(crate) fn keep_elements(
        &self,
        message: &[u8],
        is_kept: impl Fn(usize) -> bool,
    ) -> Result<Vec<u8>, String> {
        let (mut input, mut kept) = (Input(message), Vec::with_capacity(message.len()));
        let mut places = 0..;
        let mut is_next_kept = || places.next().is_some_and(&is_kept);
        while !input.0.is_empty() {
            let whole = input.0;
            let tag = input.varint()?;
            let tag_bytes = before(whole, input.0);
            let field = self.field(u32::try_from(tag >> 3).unwrap_or(u32::MAX))?;
            let wire = Wire::read(tag & 7).unwrap_or(field.wire);
            let value = input.skip(wire)?;
            if field.each.is_none() {
                kept.extend_from_slice(before(whole, input.0));
            } else if field.packable && wire == Wire::Length {
                let (mut packed, mut left) = (Input(value), Vec::with_capacity(value.len()));
                while !packed.0.is_empty() {
                    let element = packed.0;
                    packed.skip(field.wire)?;
                    if is_next_kept() {
                        left.extend_from_slice(before(element, packed.0));
                    }
                }
                if !left.is_empty() {
                    kept.extend_from_slice(tag_bytes);
                    prost_reflect::prost::encoding::encode_varint(left.len() as u64, &mut kept);
                    kept.extend_from_slice(&left);
                }
            } else if is_next_kept() {
                kept.extend_from_slice(before(whole, input.0));
            }
        }
        Ok(kept)
    }

    fn field(&self, number: u32) -> Result<&Field, String> {
        let place = self.fields.binary_search_by_key(&number, |field| field.number);
        let field = place.ok().and_then(|place| self.fields.get(place));
        // The app may know it: of two versions of a message it may have the newer one.
        field.ok_or_else(|| format!("{} has no field number {number} in the .proto files here", self.name))
    }

    fn read_value(
        &self,
        field: &Field,
        wire: Wire,
        input: &mut Input<'_>,
        values: &mut Values,
    ) -> Result<(), String> {
        let (number, bytes) = match wire {
            Wire::Varint => (input.varint()?, &[][..]),
            Wire::Fixed64 => (input.fixed::<8>().map(u64::from_le_bytes)?, &[][..]),
            Wire::Fixed32 => (input.fixed::<4>().map(|bytes| u32::from_le_bytes(bytes).into())?, &[][..]),
            Wire::Length => (0, input.bytes()?),
            Wire::Group => return Err(format!("the field `{}` of {} is a group", field.name, self.name)),
        };
        match &field.taken {
            Taken::Not => Ok(()),
            Taken::Within(shape) => shape.read_into(bytes, values),
            // Every reader knows packed elements and single ones, in any mixture.
            Taken::Value { .. } if field.packable && wire == Wire::Length => {
                let mut packed = Input(bytes);
                while !packed.0.is_empty() {
                    self.read_value(field, field.wire, &mut packed, values)?;
                }
                Ok(())
            }
            Taken::Value { optional: true, kind: MemberType::Key, .. }
                if bytes.is_empty() && !field.presence =>
            {
                Ok(())
            }
            taken => taken.tell(number, bytes, values),
        }
    }

    /// What is absent is its default, which the app sees too, or missing.
    fn complete(&self, seen: &[u32], values: &mut Values) -> Result<(), String> {
        for field in self.fields.iter().filter(|field| !seen.contains(&field.number)) {
            if let Some(each) = &field.each {
                each.check(values)?;
                continue;
            }
            match &field.taken {
                Taken::Not => {}
                Taken::Within(shape) => shape.absent()?,
                Taken::Value { optional: true, .. } => {}
                Taken::Value { member, .. } if field.presence => return Err(missing(member)),
                taken => taken.tell(0, &[], values)?,
            }
        }
        Ok(())
    }

    /// An error if something in a message that is not there must be told.
    fn absent(&self) -> Result<(), String> {
        for field in &self.fields {
            match (&field.taken, &field.each) {
                (_, Some(each)) => each.check(&Values::new())?,
                (Taken::Not | Taken::Value { optional: true, .. }, None) => {}
                (Taken::Within(shape), None) => shape.absent()?,
                (Taken::Value { member, .. }, None) => return Err(missing(member)),
            }
        }
        Ok(())
    }

    /// The lists that messages tell, and the way to the repeated field that each leads through.
    pub(crate) fn lists(&self) -> BTreeMap<String, String> {
        let mut lists = BTreeMap::new();
        for field in &self.fields {
            match (&field.taken, &field.each) {
                (_, Some(each)) => {
                    lists.extend(each.members.iter().map(|member| (member.clone(), field.name.clone())));
                }
                (Taken::Within(shape), None) => {
                    let below = shape.lists().into_iter();
                    lists.extend(below.map(|(member, way)| (member, format!("{}.{way}", field.name))));
                }
                _ => {}
            }
        }
        lists
    }
}

impl Each {
    /// What the elements of a repeated field are to tell, if anything. The way goes on from one of them.
    fn new(field: &FieldDescriptor, below: &mut [Wanted<'_>]) -> Result<Option<Self>, (String, String)> {
        let Some(Member { optional, .. }) = below.first().map(|wanted| wanted.member) else {
            return Ok(None);
        };
        let name = field.full_name();
        for wanted in below.iter_mut() {
            let why = if !wanted.member.many {
                "is repeated: what stands in it is a list, such as \"[id]\""
            } else if wanted.repeated {
                "is repeated within a repeated field: a list has no lists in it"
            } else if wanted.member.optional != optional {
                "is repeated: of its lists all may be missing, or none"
            } else {
                wanted.repeated = true;
                continue;
            };
            return Err((wanted.name.to_owned(), format!("{name} {why}")));
        }
        let members = below.iter().map(|wanted| wanted.name.to_owned()).collect();
        Ok(Some(Self { members, optional }))
    }

    /// INVARIANT: its lists have one length, since each element tells one value of each.
    fn check(&self, values: &Values) -> Result<(), String> {
        match self.members.iter().find(|member| !self.optional && !values.contains_key(*member)) {
            Some(member) => Err(wrong_list(member, MAX_LIST)),
            None => Ok(()),
        }
    }
}

impl Taken {
    /// Tells what a field says, as one value or as the next of a list.
    fn tell(&self, number: u64, bytes: &[u8], values: &mut Values) -> Result<(), String> {
        let Self::Value { member, kind, scalar, many, .. } = self else { return Ok(()) };
        let value = value(*scalar, *kind, number, bytes).ok_or_else(|| wrong_type(member, *kind))?;
        match values.get_mut(member) {
            Some(AttributeValue::Set(told)) if *many => {
                if told.len() == MAX_LIST {
                    return Err(wrong_list(member, MAX_LIST));
                }
                told.push(value);
            }
            _ => {
                let value = if *many { AttributeValue::Set(vec![value]) } else { value };
                values.insert(member.clone(), value);
            }
        }
        Ok(())
    }
}

/// The value, if it has one meaning for every reader of its type.
fn value(scalar: Scalar, kind: MemberType, number: u64, bytes: &[u8]) -> Option<AttributeValue> {
    let exact = |number: i64| {
        (-MAX_EXACT_INTEGER..=MAX_EXACT_INTEGER).contains(&number).then_some(AttributeValue::Long(number))
    };
    let zigzag = |number: u64| (number >> 1) as i64 ^ -((number & 1) as i64);
    match scalar {
        Scalar::Text => crate::body::text_value(kind, std::str::from_utf8(bytes).ok()?),
        // Readers take any number but zero for true; writers write one.
        Scalar::Bool => matches!(number, 0 | 1).then_some(AttributeValue::Bool(number == 1)),
        // Negative ones are written as 64 bits; what does not fit is cut by some readers.
        Scalar::Int32 => exact(i32::try_from(number as i64).ok()?.into()),
        Scalar::Sint32 => exact(zigzag(u32::try_from(number).ok()?.into())),
        Scalar::Uint32 | Scalar::Fixed32 => exact(u32::try_from(number).ok()?.into()),
        Scalar::Sfixed32 => exact(i64::from(number as u32 as i32)),
        Scalar::Int64 | Scalar::Sfixed64 => exact(number as i64),
        Scalar::Sint64 => exact(zigzag(number)),
        Scalar::Uint64 | Scalar::Fixed64 => exact(i64::try_from(number).ok()?),
    }
}

/// What is left of a message.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn varint(&mut self) -> Result<u64, String> {
        let mut number = 0u64;
        for place in 0..MAX_VARINT_BYTES {
            let (byte, rest) = self.0.split_first().ok_or_else(cut)?;
            self.0 = rest;
            let bits = u64::from(byte & 0x7f);
            let shifted = bits << (7 * place);
            if shifted >> (7 * place) != bits {
                return Err("a number has more than 64 bits".to_owned());
            }
            number |= shifted;
            if byte & 0x80 == 0 {
                return Ok(number);
            }
        }
        Err("a number has more than 64 bits".to_owned())
    }

    fn fixed<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let (bytes, rest) = self.0.split_first_chunk::<N>().ok_or_else(cut)?;
        self.0 = rest;
        Ok(*bytes)
    }

    /// Passes over a value; what it holds, if it is one of a length.
    fn skip(&mut self, wire: Wire) -> Result<&'a [u8], String> {
        match wire {
            Wire::Varint => self.varint().map(|_| &[][..]),
            Wire::Fixed64 => self.fixed::<8>().map(|_| &[][..]),
            Wire::Fixed32 => self.fixed::<4>().map(|_| &[][..]),
            Wire::Length => self.bytes(),
            Wire::Group => Err("a group is not read".to_owned()),
        }
    }

    fn bytes(&mut self) -> Result<&'a [u8], String> {
        let length = usize::try_from(self.varint()?).map_err(|_| cut())?;
        let (bytes, rest) = self.0.split_at_checked(length).ok_or_else(cut)?;
        self.0 = rest;
        Ok(bytes)
    }
}

/// What of `whole` was read when this was left.
fn before<'a>(whole: &'a [u8], left: &[u8]) -> &'a [u8] {
    whole.get(..whole.len().saturating_sub(left.len())).unwrap_or_default()
}

fn cut() -> String {
    "the message is cut short".to_owned()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PROTO: &str = r#"
syntax = "proto3";
package bank;
import "google/protobuf/any.proto";
import "google/protobuf/timestamp.proto";
message Place { string iban = 1; int64 number = 2; optional string branch = 3; }
message Move {
  Place from = 1;
  string to = 2;
  uint32 cents = 3;
  bool urgent = 4;
  oneof note { string text = 5; bytes picture = 6; }
  repeated int32 tags = 7;
  google.protobuf.Any extra = 8;
  map<string, string> labels = 9;
  sint32 offset = 10;
  google.protobuf.Timestamp at = 11;
  double rate = 12;
}
message Line {
  Place place = 1;
  string to = 2;
  optional int64 limit = 3;
  repeated Place more = 4;
  oneof note { string text = 5; bytes picture = 6; }
}
message Range { string prefix = 1; optional string from = 2; }
message Block { string id = 1; repeated Line lines = 2; }
message Batch {
  repeated Line lines = 1;
  repeated int32 numbers = 2;
  repeated string names = 3;
  Block block = 4;
  repeated fixed64 stamps = 5;
  Range range = 6;
}
service Batches { rpc Run(Batch) returns (Batch); }
service Accounts {
  rpc Transfer(Move) returns (Move);
  rpc Batch(stream Move) returns (Move);
}
"#;

    fn pool() -> DescriptorPool {
        compile(&[Source { name: "bank.proto", text: PROTO }]).unwrap()
    }

    fn members(list: &[(&str, &str)]) -> Members {
        list.iter().map(|(name, kind)| ((*name).to_owned(), Member::parse(kind).unwrap())).collect()
    }

    fn call(list: &[(&str, &str)]) -> Result<Call, String> {
        Call::new(&pool(), "/bank.Accounts/Transfer", &members(list)).map_err(|(_, message)| message)
    }

    fn transfer() -> Call {
        call(&[
            ("from.iban", "id"),
            ("from.number", "int"),
            ("from.branch", "text?"),
            ("to", "id"),
            ("cents", "int"),
            ("urgent", "bool"),
            ("offset", "int"),
        ])
        .unwrap()
    }

    fn tag(number: u32, wire: u32) -> Vec<u8> {
        varint(u64::from(number << 3 | wire))
    }

    fn varint(mut number: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        while number > 0x7f {
            bytes.push(number as u8 | 0x80);
            number >>= 7;
        }
        bytes.push(number as u8);
        bytes
    }

    fn text(number: u32, text: &[u8]) -> Vec<u8> {
        [tag(number, 2), varint(text.len() as u64), text.to_vec()].concat()
    }

    fn number(field: u32, value: u64) -> Vec<u8> {
        [tag(field, 0), varint(value)].concat()
    }

    fn from() -> Vec<u8> {
        text(1, &[text(1, b"DE17"), number(2, 42)].concat())
    }

    #[test]
    fn fields_are_read_by_path_and_absent_ones_are_their_defaults() {
        let message =
            [from(), text(2, b"NL42"), number(3, 500), number(10, 5), text(9, b"\x0a\x01a\x12\x01b")];
        let values = transfer().message.read(&message.concat()).unwrap();
        let expected: Values = [
            ("from.iban", AttributeValue::Text("DE17".into())),
            ("from.number", AttributeValue::Long(42)),
            ("to", AttributeValue::Text("NL42".into())),
            ("cents", AttributeValue::Long(500)),
            ("urgent", AttributeValue::Bool(false)),
            ("offset", AttributeValue::Long(-3)),
        ]
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .collect();
        assert_eq!(values, expected);
        let with_branch = text(1, &[text(1, b"DE17"), text(3, b"north")].concat());
        let values = transfer().message.read(&[with_branch, text(2, b"x")].concat()).unwrap();
        assert_eq!(values["from.branch"], AttributeValue::Text("north".into()));
        assert_eq!(values["from.number"], AttributeValue::Long(0));
    }

    #[test]
    fn policy_23_24_what_has_more_than_one_reading_is_refused() {
        let good = [from(), text(2, b"NL42")].concat();
        assert!(transfer().message.read(&good).is_ok());
        let with = |more: Vec<u8>| [good.clone(), more].concat();
        for (bad, why) in [
            (with(text(2, b"XX66")), "`to` of bank.Move appears twice"),
            (with(from()), "`from` of bank.Move appears twice"),
            (
                [text(1, &[text(1, b"a"), text(1, b"b")].concat()), text(2, b"x")].concat(),
                "`iban` of bank.Place appears twice",
            ),
            (with([text(5, b"a"), text(6, b"b")].concat()), "not the only one of its oneof"),
            (with(number(99, 1)), "no field number 99"),
            (with(number(2, 1)), "`to` of bank.Move appears twice"),
            ([from(), number(2, 1)].concat(), "`to` of bank.Move is written as another type"),
            (with(tag(3, 3)), "written as another type"),
            (with(tag(0, 2)), "no field number 0"),
            (with(vec![0xff; 11]), "more than 64 bits"),
            (with(number(3, 1 << 32)), "\"cents\" is not an integer"),
            (with(number(4, 2)), "\"urgent\" is not true or false"),
            (with(number(10, 1 << 40)), "\"offset\" is not an integer"),
            (with(vec![0x22]), "another type"),
            (with(vec![0x18]), "cut short"),
            (with([tag(11, 2), varint(200)].concat()), "cut short"),
            ([from(), text(2, b"a/b")].concat(), "\"to\" is not an id"),
            ([from(), text(2, b"\xff")].concat(), "\"to\" is not an id"),
            (from(), "\"to\" is not an id"),
            (text(2, b"x"), "the member \"from.iban\" is missing"),
            (
                [text(1, &number(2, u64::MAX >> 1)), text(2, b"x")].concat(),
                "\"from.number\" is not an integer",
            ),
        ] {
            let error = transfer().message.read(&bad).unwrap_err();
            assert!(error.contains(why), "{error}, not {why}");
        }
    }

    #[test]
    fn what_is_not_judged_passes_in_every_form() {
        let good = [from(), text(2, b"NL42")].concat();
        for more in [
            number(7, 1),
            [number(7, 1), number(7, 2)].concat(),
            text(7, &[1, 2, 3]),
            text(8, b"\x0a\x03abc"),
            [tag(12, 1), vec![0; 8]].concat(),
            text(6, b"\xff\xfe"),
        ] {
            assert!(transfer().message.read(&[good.clone(), more].concat()).is_ok());
        }
    }

    #[test]
    fn paths_that_lead_nowhere_are_said_when_the_map_is_read() {
        for (member, kind, why) in [
            ("form", "id", "the message bank.Move has no field `form`; did you mean `from`?"),
            ("from", "id", "bank.Move.from is a message, not a value"),
            ("from.ibn", "id", "the message bank.Place has no field `ibn`; did you mean `iban`?"),
            ("to.x", "id", "bank.Move.to is no message and has no field `x`"),
            ("tags", "int", "bank.Move.tags is repeated"),
            ("tags", "[id]", "which is no id"),
            ("cents", "[int]", "bank.Move.cents is one value"),
            ("labels.a", "id", "bank.Move.labels is a map"),
            ("labels.a", "[id]", "bank.Move.labels is a map"),
            ("extra.value", "id", "bank.Move.extra may hold any message"),
            ("rate", "int", "which is no int"),
            ("cents", "id", "which is no id"),
            ("to", "id?", "bank.Move.to is never missing"),
        ] {
            let error = call(&[(member, kind)]).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
        // Beside one that leads somewhere, too.
        let both = Call::new(&pool(), "/bank.Accounts/Transfer", &members(&[("to", "id"), ("to.x", "id")]));
        let (member, error) = both.unwrap_err();
        assert_eq!(member.as_deref(), Some("to.x"));
        assert_eq!(error, "bank.Move.to is no message and has no field `x`; take out `to.x`");
        let of = |path: &str| Call::new(&pool(), path, &Members::new());
        assert!(
            of("/bank.Accounts/Batch").unwrap().streams && !of("/bank.Accounts/Transfer").unwrap().streams
        );
        assert_eq!(
            of("/bank.Account/Batch").unwrap_err().1,
            "the .proto files have no service `bank.Account`; did you mean `bank.Accounts`?"
        );
        assert!(of("/bank.Accounts/Transfers").unwrap_err().1.contains("did you mean `Transfer`?"));
    }

    fn batch(list: &[(&str, &str)]) -> Result<Call, String> {
        Call::new(&pool(), "/bank.Batches/Run", &members(list)).map_err(|(_, message)| message)
    }

    /// Two lists that lead through one field, and what is beside them.
    fn lines() -> Call {
        batch(&[("lines.place.iban", "[id]"), ("lines.place.number", "[int]"), ("lines.to", "[key]")])
            .unwrap()
    }

    fn line(iban: &[u8], to: &[u8]) -> Vec<u8> {
        text(1, &[text(1, &text(1, iban)), text(2, to)].concat())
    }

    fn set(values: &[&str]) -> AttributeValue {
        AttributeValue::Set(values.iter().map(|value| AttributeValue::Text((*value).into())).collect())
    }

    #[test]
    fn lists_are_told_element_by_element() {
        let message = [
            line(b"a", b"x/1"),
            text(1, &[text(2, b"y"), text(1, &[text(1, b"b"), number(2, 7)].concat())].concat()),
            text(3, b"not read"),
            line(b"a", b"x/1"),
        ];
        let values = lines().message.read(&message.concat()).unwrap();
        assert_eq!(values["lines.place.iban"], set(&["a", "b", "a"]));
        assert_eq!(values["lines.to"], set(&["x/1", "y", "x/1"]));
        let numbers = [0, 7, 0].map(AttributeValue::Long);
        assert_eq!(values["lines.place.number"], AttributeValue::Set(numbers.into()));

        let below = batch(&[("block.lines.to", "[key]"), ("block.id", "id")]).unwrap();
        let message = text(4, &[text(2, &text(2, b"x/1")), text(1, b"b"), text(2, &text(2, b"z"))].concat());
        let values = below.message.read(&message).unwrap();
        assert_eq!(values["block.lines.to"], set(&["x/1", "z"]));
        let ways = lines().message.lists().into_values().collect::<Vec<_>>();
        assert_eq!(ways, ["lines", "lines", "lines"]);
        assert_eq!(below.message.lists()["block.lines.to"], "block.lines");
        assert!(below.message.read(&[]).unwrap_err().contains("missing"));
    }

    #[test]
    fn every_element_is_read_as_strictly_as_a_message() {
        let good = line(b"a", b"x/1");
        let with = |within: Vec<u8>| [good.clone(), text(1, &within), good.clone()].concat();
        let place = || text(1, &text(1, b"b"));
        for (bad, why) in [
            (with([place(), text(2, b"y"), text(2, b"z")].concat()), "`to` of bank.Line appears twice"),
            (with([place(), place(), text(2, b"y")].concat()), "`place` of bank.Line appears twice"),
            (with([place(), text(2, b"y"), number(99, 1)].concat()), "no field number 99"),
            (with([place(), text(2, b"y"), text(5, b"a"), text(6, b"b")].concat()), "only one of its oneof"),
            (with([place(), number(2, 1)].concat()), "`to` of bank.Line is written as another type"),
            (with([place(), vec![0x12, 9]].concat()), "cut short"),
            (with(place()), "\"lines.to\" is not a key"),
            (with([place(), text(2, b"y/")].concat()), "\"lines.to\" is not a key"),
            (with([place(), text(2, b"y%2Fz")].concat()), "\"lines.to\" is not a key"),
            (with(text(2, b"y")), "the member \"lines.place.iban\" is missing"),
            (with([text(1, &[]), text(2, b"y")].concat()), "\"lines.place.iban\" is not an id"),
            (with(Vec::new()), "the member \"lines.place.iban\" is missing"),
            (number(1, 1), "`lines` of bank.Batch is written as another type"),
            (Vec::new(), "\"lines.place.iban\" is not a list of 1 to 256"),
            (good.repeat(MAX_LIST + 1), "\"lines.place.iban\" is not a list of 1 to 256"),
        ] {
            let error = lines().message.read(&bad).unwrap_err();
            assert!(error.contains(why), "{error}, not {why}");
        }
        assert!(lines().message.read(&good.repeat(MAX_LIST)).is_ok());
        // Whose presence is told apart is missing where it is absent.
        let limits = batch(&[("lines.limit", "[int]")]).unwrap();
        assert!(limits.message.read(&text(1, &number(3, 1))).is_ok());
        assert!(limits.message.read(&good).unwrap_err().contains("missing"));
    }

    #[test]
    fn numbers_are_the_same_list_packed_and_not() {
        let call = batch(&[("numbers", "[int]"), ("stamps", "[int]")]).unwrap();
        let stamp = [tag(5, 1), 9u64.to_le_bytes().to_vec()].concat();
        let long =
            |values: &[i64]| AttributeValue::Set(values.iter().copied().map(AttributeValue::Long).collect());
        for numbers in [
            [number(2, 1), number(2, 300), number(2, 0)].concat(),
            text(2, &[1, 0xac, 0x02, 0]),
            [text(2, &[1]), number(2, 300), text(2, &[]), text(2, &[0])].concat(),
        ] {
            let values = call.message.read(&[stamp.clone(), numbers].concat()).unwrap();
            assert_eq!((&values["numbers"], &values["stamps"]), (&long(&[1, 300, 0]), &long(&[9])));
        }
        for (bad, why) in [
            (text(2, &[1, 0xac]), "cut short"),
            (text(2, &[]), "\"numbers\" is not a list of 1 to 256"),
            (text(2, &[1; MAX_LIST + 1]), "\"numbers\" is not a list of 1 to 256"),
            (text(2, &varint(1 << 40)), "\"numbers\" is not an integer"),
            ([tag(2, 1), vec![0; 8]].concat(), "written as another type"),
        ] {
            let error = call.message.read(&[stamp.clone(), bad].concat()).unwrap_err();
            assert!(error.contains(why), "{error}, not {why}");
        }
        assert!(
            call.message.read(&[text(5, &[0; 12]), number(2, 1)].concat()).unwrap_err().contains("cut short")
        );
        let names = batch(&[("names", "[id]")]).unwrap();
        assert_eq!(
            names.message.read(&[text(3, b"a"), text(3, b"b")].concat()).unwrap()["names"],
            set(&["a", "b"])
        );
        assert!(names.message.read(&[text(3, b"a"), text(3, b"")].concat()).is_err());
    }

    #[test]
    fn lists_and_keys_may_be_missing_where_that_is_said() {
        let optional = batch(&[("lines.to", "[key]?"), ("block.lines.to", "[key]?")]).unwrap();
        assert_eq!(optional.message.read(&[]).unwrap(), Values::new());
        assert_eq!(optional.message.read(&text(1, &text(2, b"x"))).unwrap()["lines.to"], set(&["x"]));
        assert!(optional.message.read(&text(1, &[])).unwrap_err().contains("\"lines.to\" is not a key"));

        let range = |kind: &str| batch(&[("range.prefix", kind)]).unwrap();
        let prefix = |text_: &[u8]| text(6, &text(1, text_));
        assert_eq!(
            range("key?").message.read(&prefix(b"a/b")).unwrap()["range.prefix"],
            AttributeValue::Text("a/b".into())
        );
        // Whether an empty text is written makes no difference to any reader.
        for whole in [prefix(b""), text(6, &[]), Vec::new()] {
            assert_eq!(range("key?").message.read(&whole).unwrap(), Values::new());
            assert!(range("key").message.read(&whole).is_err());
        }
        // Where it does, an empty one is no key.
        let from = batch(&[("range.from", "key?")]).unwrap();
        assert_eq!(from.message.read(&text(6, &[])).unwrap(), Values::new());
        assert!(from.message.read(&text(6, &text(2, b""))).is_err());

        for (list, why) in [
            (&[("lines.to", "key")][..], "bank.Batch.lines is repeated: what stands in it is a list"),
            (&[("lines.to", "[key]?"), ("lines.place.iban", "[id]")], "all may be missing, or none"),
            (&[("lines.more.iban", "[id]")], "bank.Line.more is repeated within a repeated field"),
            (&[("lines", "[id]")], "bank.Batch.lines is a message, not a value"),
            (&[("block.id", "[id]")], "bank.Block.id is one value"),
            (&[("range.prefix", "id?")], "is never missing"),
        ] {
            let error = batch(list).unwrap_err();
            assert!(error.contains(why), "{error}, not {why}");
        }
    }

    #[test]
    fn files_import_one_another_and_errors_name_theirs() {
        let common = Source {
            name: "common.proto",
            text: "syntax = \"proto3\"; package c; message Id { string v = 1; }",
        };
        let main = "syntax = \"proto3\"; import \"bank/v1/common.proto\"; message A { c.Id id = 1; } service S { rpc Get(A) returns (A); }";
        let pool = compile(&[common, Source { name: "main.proto", text: main }]).unwrap();
        let call = Call::new(&pool, "/S/Get", &members(&[("id.v", "id")])).unwrap();
        assert!(call.message.read(&text(1, &text(1, b"x"))).is_ok());
        let bad = Source { name: "bad.proto", text: "syntax = \"proto3\"; message {" };
        let importing = Source { name: "main.proto", text: "syntax = \"proto3\"; import \"v1/bad.proto\";" };
        for sources in [vec![bad], vec![importing, bad]] {
            let error = compile(&sources).unwrap_err();
            assert_eq!(at_fault(&error, &sources), Some(sources.len() - 1), "{error}");
        }
    }

    proptest! {
        #[test]
        fn reading_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            let _unused = transfer().message.read(&bytes);
            let _unused = lines().message.read(&bytes);
            let _unused = lines().message.keep_elements(&bytes, |at| at % 2 == 0);
        }

        /// As many values of each list as there are elements, and those that every reader finds there.
        #[test]
        fn lists_that_are_read_are_read_alike_by_others(
            elements in proptest::collection::vec(("[a-z]{1,2}", "[a-z]{1,2}(/[a-z]{1,2}){0,2}", proptest::option::of(0i64..9)), 1..6),
            numbers in proptest::collection::vec((proptest::collection::vec(any::<i32>(), 0..3), any::<bool>()), 0..4),
            unread in proptest::collection::vec(prop_oneof![
                any::<String>().prop_map(|name| text(3, name.as_bytes())),
                any::<u64>().prop_map(|stamp| [tag(5, 1), stamp.to_le_bytes().to_vec()].concat()),
            ], 0..4),
            rest in prop_oneof![4 => Just(Vec::new()), 1 => proptest::collection::vec(any::<u8>(), 1..3)],
        ) {
            let mut message: Vec<u8> = unread.concat();
            for (iban, to, count) in &elements {
                let count = count.map(|count| number(2, count as u64)).unwrap_or_default();
                let place = text(1, &[text(1, iban.as_bytes()), count].concat());
                message.extend(text(1, &[place, text(2, to.as_bytes())].concat()));
            }
            for (values, packed) in &numbers {
                let written = values.iter().map(|value| varint(i64::from(*value) as u64));
                if *packed {
                    message.extend(text(2, &written.collect::<Vec<_>>().concat()));
                } else {
                    message.extend(written.flat_map(|value| [tag(2, 0), value].concat()));
                }
            }
            message.extend(&rest);
            let call = batch(&[("lines.place.iban", "[id]"), ("lines.to", "[key]"), ("numbers", "[int]?")]).unwrap();
            let read = call.message.read(&message);
            prop_assert!(read.is_ok() || !rest.is_empty(), "{read:?}");
            if let Ok(values) = read {
                let descriptor = pool().get_message_by_name("bank.Batch").unwrap();
                let other = prost_reflect::DynamicMessage::decode(descriptor, &message[..]).unwrap();
                let field = |of: &DynamicMessage, name: &str| of.get_field_by_name(name).unwrap().into_owned();
                let lines = field(&other, "lines");
                let lines: Vec<_> = lines.as_list().unwrap().iter().map(|line| line.as_message().unwrap().clone()).collect();
                let told = |read: &dyn Fn(&DynamicMessage) -> prost_reflect::Value| {
                    AttributeValue::Set(lines.iter().map(|line| AttributeValue::Text(read(line).as_str().unwrap().into())).collect())
                };
                let iban = told(&|line| field(field(line, "place").as_message().unwrap(), "iban"));
                prop_assert_eq!(&values["lines.place.iban"], &iban);
                prop_assert_eq!(&values["lines.to"], &told(&|line| field(line, "to")));
                let numbers = field(&other, "numbers");
                let numbers: Vec<_> = numbers.as_list().unwrap().iter().map(|value| AttributeValue::Long(value.as_i32().unwrap().into())).collect();
                prop_assert_eq!(values.get("numbers").cloned().unwrap_or(AttributeValue::Set(Vec::new())), AttributeValue::Set(numbers));
            }
        }

        /// Elements that are taken out are gone for every reader, those that are left are in order, and every other byte
        /// is as it came.
        #[test]
        fn policy_33_what_is_left_of_a_message_is_exactly_what_is_kept(
            pieces in proptest::collection::vec(prop_oneof![
                ("[a-z]{1,3}", "[a-z]{0,3}").prop_map(|(to, note)| {
                    (1u32, text(1, &[text(1, &text(1, b"x")), text(2, to.as_bytes()), text(5, note.as_bytes())].concat()))
                }),
                (proptest::collection::vec(any::<i32>(), 0..4), any::<bool>()).prop_map(|(values, packed)| {
                    let written = values.iter().map(|value| varint(i64::from(*value) as u64));
                    let bytes = if packed {
                        text(2, &written.collect::<Vec<_>>().concat())
                    } else {
                        written.flat_map(|value| [tag(2, 0), value].concat()).collect()
                    };
                    (2, bytes)
                }),
                "[a-z]{1,3}".prop_map(|name| (3, text(3, name.as_bytes()))),
                any::<u64>().prop_map(|stamp| (5, [tag(5, 1), stamp.to_le_bytes().to_vec()].concat())),
            ], 1..12),
            kept in proptest::collection::vec(any::<bool>(), 64),
        ) {
            let whole: Vec<u8> = pieces.iter().flat_map(|(_, bytes)| bytes.clone()).collect();
            for (number, member, kind) in [(1, "lines.to", "[id]?"), (2, "numbers", "[int]?"), (3, "names", "[id]?")] {
                let shape = batch(&[(member, kind)]).unwrap().message;
                let values = |message: &[u8]| match shape.read(message).unwrap().remove(member) {
                    Some(AttributeValue::Set(values)) => values,
                    _ => Vec::new(),
                };
                let left = shape.keep_elements(&whole, |at| kept[at]).unwrap();
                let mut wanted = values(&whole);
                let mut places = 0..;
                wanted.retain(|_| kept[places.next().unwrap()]);
                prop_assert_eq!(values(&left), wanted);
                // Without the field itself the two are the same bytes, and with all of it too.
                let others = |message: &[u8]| shape.keep_elements(message, |_| false).unwrap();
                let rest: Vec<u8> =
                    pieces.iter().filter(|(of, _)| *of != number).flat_map(|(_, bytes)| bytes.clone()).collect();
                prop_assert_eq!(&others(&left), &rest);
                prop_assert_eq!(&others(&whole), &rest);
                if number != 2 {
                    prop_assert_eq!(&shape.keep_elements(&whole, |_| true).unwrap(), &whole);
                }
            }
        }

        /// Whatever a message says of the object is what every reader of it says.
        #[test]
        fn a_message_that_is_read_is_read_alike_by_others(
            bytes in proptest::collection::vec(any::<u8>(), 0..40), iban in "[a-z0-9]{0,6}", cents in any::<u32>(),
        ) {
            let message = [text(1, &text(1, iban.as_bytes())), number(3, cents.into()), bytes].concat();
            if let Ok(values) = transfer().message.read(&message) {
                let descriptor = pool().get_message_by_name("bank.Move").unwrap();
                let other = prost_reflect::DynamicMessage::decode(descriptor, &message[..]).unwrap();
                let from = other.get_field_by_name("from").unwrap();
                let iban = from.as_message().unwrap().get_field_by_name("iban").unwrap().as_str().unwrap().to_owned();
                prop_assert_eq!(&values["from.iban"], &AttributeValue::Text(iban.into()));
                let cents = other.get_field_by_name("cents").unwrap().as_u32().unwrap();
                prop_assert_eq!(&values["cents"], &AttributeValue::Long(cents.into()));
            }
        }
    }
}
