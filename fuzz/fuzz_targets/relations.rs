//! A token and an object's relations are read without a panic, have one spelling, and are read alike where they are written and
//! where they are decided by.
#![no_main]

use ca::relations::{Attributes, Object};
use libfuzzer_sys::fuzz_target;
use policy::{RelationsCopy, RelationsToken};

fuzz_target!(|text: &str| {
    if let Ok(token) = text.parse::<RelationsToken>() {
        assert_eq!(token.to_string(), text);
    }
    if let Ok(object) = Object::written(text) {
        assert_eq!(object.to_string(), text);
    }
    let mut copy = RelationsCopy::default();
    let whole = |text: &str| [("Account".to_owned(), "17".to_owned(), Some(text.to_owned()))];
    let taken = copy.take("e1", 1, None, whole(text));
    if let Ok(attributes) = Attributes::parse(text) {
        let stored = attributes.text();
        assert_eq!(Attributes::parse(&stored).expect("what is stored is read"), attributes);
        copy.take("e1", 2, None, whole(&stored)).expect("what control takes, a sidecar takes");
        taken.expect("however it is spelled");
    }
});
