use identity::jws;
use ring::hmac;
use ring::signature::{Ed25519KeyPair, KeyPair as _};
use serde_json::json;

use super::*;
use crate::testing::{ISSUER, NOW, TestKey, access_claims, now, pins};

fn access(pins: &Pins, keys: &KeySet, token: &str) -> Result<AccessToken, JwtError> {
    pins.access_token(&Compact::parse(token)?, keys, now())
}

type Change = fn(&mut Value, &mut Value);

/// Every change must be refused, and the same token without it accepted.
fn refuse(cases: &[(&str, Change)]) {
    let key = TestKey::new("k1");
    assert!(access(&pins(), &key.keys(), &key.access(|_, _| {})).is_ok());
    for (name, change) in cases {
        let outcome = access(&pins(), &key.keys(), &key.access(change));
        assert!(outcome.is_err(), "{name}: {outcome:?}");
    }
}

fn remove(value: &mut Value, name: &str) {
    value.as_object_mut().unwrap().remove(name);
}

#[test]
fn a_good_access_token_says_who_it_is() {
    let key = TestKey::new("k1");
    let token = access(&pins(), &key.keys(), &key.access(|_, _| {})).unwrap();
    assert_eq!((token.subject.as_str(), token.client.as_str(), token.auth_time), ("alice", "cli", NOW - 5));
    assert_eq!(
        (token.scopes, token.groups),
        (vec!["openid".into(), "bank".into()], vec!["customers".to_owned()])
    );
    assert_eq!(token.expires.as_secs(), NOW + 300);
    assert_eq!((token.tenant, token.mfa), (None, false));
}

#[test]
fn a_tenant_and_a_second_factor_are_what_the_issuer_says_of_them() {
    let key = TestKey::new("k1");
    let read = |name: &str, value: serde_json::Value| {
        let token = access(&pins(), &key.keys(), &key.access(|_, claims| claims[name] = value.clone()));
        token.map(|token| (token.tenant, token.mfa))
    };
    assert_eq!(read("tenant", "bank".into()).unwrap(), (Some("bank".to_owned()), false));
    assert_eq!(read("tid", "bank".into()).unwrap(), (Some("bank".to_owned()), false));
    assert_eq!(read("amr", json!(["pwd", "mfa"])).unwrap(), (None, true));
    assert_eq!(read("amr", json!(["pwd", "MFA", "mfa2"])).unwrap(), (None, false));
    for (name, value) in [("tenant", json!(["bank"])), ("amr", json!("mfa")), ("tid", json!(5))] {
        assert!(matches!(read(name, value), Err(JwtError::Claim(_))), "{name}");
    }
}

#[test]
fn gateway_1_none_is_refused_in_any_case_with_or_without_signature() {
    let key = TestKey::new("k1");
    for alg in ["none", "None", "NONE", "nOnE", "", "HS256", "ES384", "es256", "ES256 "] {
        let signed = key.access(|header, _| header["alg"] = alg.into());
        let input = signed.rsplit_once('.').unwrap().0;
        for token in [signed.clone(), format!("{input}."), format!("{input}.AA")] {
            assert!(access(&pins(), &key.keys(), &token).is_err(), "{alg} {token}");
        }
    }
    let mut only_ed = pins();
    only_ed.algorithms = vec![Algorithm::EdDsa];
    let pinned = access(&only_ed, &key.keys(), &key.access(|_, _| {}));
    assert!(matches!(pinned, Err(JwtError::Algorithm)), "allowed elsewhere, not for this issuer");
}

#[test]
fn gateway_2_hmac_under_the_public_key_is_refused() {
    let key = TestKey::new("k1");
    let header = json!({"typ": "at+jwt", "alg": "HS256", "kid": "k1"}).to_string();
    let input = format!("{}.{}", jws::encode(header), jws::encode(access_claims().to_string()));
    for secret in [key.public.clone(), key.jwk().to_string().into_bytes(), Vec::new()] {
        let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &secret), input.as_bytes());
        let token = format!("{input}.{}", jws::encode(tag));
        assert!(matches!(access(&pins(), &key.keys(), &token), Err(JwtError::Algorithm)));
    }
}

#[test]
fn gateway_3_critical_headers_are_refused() {
    refuse(&[
        ("crit", |header, _| header["crit"] = json!(["exp"])),
        ("empty crit", |header, _| header["crit"] = json!([])),
        ("b64", |header, _| header["b64"] = json!(false)),
        ("zip", |header, _| header["zip"] = json!("DEF")),
    ]);
}

#[test]
fn gateway_4_duplicate_names_are_refused() {
    let key = TestKey::new("k1");
    let header = key.header().to_string();
    let claims = access_claims().to_string();
    let double = |text: &str, member: &str| text.replacen('{', &format!("{{{member},"), 1);
    for (header, claims) in [
        (double(&header, r#""alg":"none""#), claims.clone()),
        (header.clone(), double(&claims, r#""sub":"bob""#)),
        (header.clone(), double(&claims, r#""s\u0075b":"bob""#)),
    ] {
        let input = format!("{}.{}", jws::encode(header), jws::encode(claims));
        // The signature is right: only the parser stands between this and acceptance.
        let random = ring::rand::SystemRandom::new();
        let pair = ring::signature::EcdsaKeyPair::from_pkcs8(
            &ring::signature::ECDSA_P256_SHA256_FIXED_SIGNING,
            &key.pkcs8,
            &random,
        );
        let signature = pair.unwrap().sign(&random, input.as_bytes()).unwrap();
        let token = format!("{input}.{}", jws::encode(signature));
        assert!(matches!(access(&pins(), &key.keys(), &token), Err(JwtError::Form(_))));
    }
}

#[test]
fn gateway_5_a_key_that_comes_with_the_token_is_not_used() {
    let (ours, theirs) = (TestKey::new("k1"), TestKey::new("k1"));
    for member in ["jwk", "jku", "x5u", "x5c"] {
        let value = if member == "jwk" { theirs.jwk() } else { json!("https://evil.example/jwks.json") };
        let token = theirs.access(|header, _| header[member] = value.clone());
        assert!(matches!(access(&pins(), &ours.keys(), &token), Err(JwtError::Signature)), "{member}");
    }
}

#[test]
fn gateway_6_the_key_is_the_one_that_kid_names() {
    let (one, two) = (TestKey::new("k1"), TestKey::new("k2"));
    let both = KeySet::parse(crate::testing::jwks(&[&one, &two]).as_bytes()).unwrap();
    let without = one.access(|header, _| remove(header, "kid"));
    assert!(access(&pins(), &one.keys(), &without).is_ok());
    assert!(matches!(access(&pins(), &both, &without), Err(JwtError::Key)));
    let other = one.access(|header, _| header["kid"] = json!("k2"));
    assert!(matches!(access(&pins(), &both, &other), Err(JwtError::Signature)));
    refuse(&[
        ("unknown", |header, _| header["kid"] = json!("k3")),
        ("number", |header, _| header["kid"] = json!(1)),
        ("null", |header, _| header["kid"] = json!(null)),
        ("long", |header, _| header["kid"] = json!("k".repeat(MAX_KID_BYTES + 1))),
    ]);
}

#[test]
fn gateway_10_iss_is_one_exact_string() {
    refuse(&[
        ("array", |_, claims| claims["iss"] = json!([ISSUER])),
        ("slash", |_, claims| claims["iss"] = json!(format!("{ISSUER}/"))),
        ("case", |_, claims| claims["iss"] = json!(ISSUER.to_uppercase())),
        ("other", |_, claims| claims["iss"] = json!("https://evil.example")),
        ("missing", |_, claims| remove(claims, "iss")),
    ]);
}

#[test]
fn gateway_11_aud_is_needed_as_string_or_array() {
    let key = TestKey::new("k1");
    let array = key.access(|_, claims| claims["aud"] = json!(["other", "bank"]));
    assert!(access(&pins(), &key.keys(), &array).is_ok());
    refuse(&[
        ("missing", |_, claims| remove(claims, "aud")),
        ("other", |_, claims| claims["aud"] = json!("gateway")),
        ("prefix", |_, claims| claims["aud"] = json!("bank2")),
        ("empty", |_, claims| claims["aud"] = json!([])),
        ("mixed", |_, claims| claims["aud"] = json!(["bank", 1])),
        ("object", |_, claims| claims["aud"] = json!({"bank": true})),
        ("null", |_, claims| claims["aud"] = json!(null)),
    ]);
}

#[test]
fn gateway_12_times_are_needed_finite_and_kept() {
    refuse(&[
        ("no exp", |_, claims| remove(claims, "exp")),
        ("exp text", |_, claims| claims["exp"] = json!("4000000000")),
        ("exp null", |_, claims| claims["exp"] = json!(null)),
        ("exp 1e19", |_, claims| claims["exp"] = json!(1e19)),
        ("exp negative", |_, claims| claims["exp"] = json!(-1)),
        ("exp now", |_, claims| claims["exp"] = json!(NOW)),
        ("exp past", |_, claims| claims["exp"] = json!(NOW - 1)),
        ("nbf ahead", |_, claims| claims["nbf"] = json!(NOW + 11)),
        ("nbf text", |_, claims| claims["nbf"] = json!("0")),
        ("iat ahead", |_, claims| claims["iat"] = json!(NOW + 11)),
        ("no iat", |_, claims| remove(claims, "iat")),
        ("iat null", |_, claims| claims["iat"] = json!(null)),
    ]);
    let key = TestKey::new("k1");
    let skewed = key.access(|_, claims| {
        claims["nbf"] = json!(NOW + 10);
        claims["iat"] = json!(NOW + 10);
        claims["exp"] = json!(NOW as f64 + 0.5);
    });
    assert!(access(&pins(), &key.keys(), &skewed).is_ok());
}

#[test]
fn gateway_13_only_access_tokens_are_access_tokens() {
    let key = TestKey::new("k1");
    for good in ["at+jwt", "AT+JWT", "application/at+jwt"] {
        assert!(access(&pins(), &key.keys(), &key.access(|header, _| header["typ"] = good.into())).is_ok());
    }
    refuse(&[
        ("jwt", |header, _| header["typ"] = json!("JWT")),
        ("none", |header, _| remove(header, "typ")),
        ("logout", |header, _| header["typ"] = json!("logout+jwt")),
        ("dpop", |header, _| header["typ"] = json!("dpop+jwt")),
        ("transaction", |header, _| header["typ"] = json!("txntoken+jwt")),
        ("array", |header, _| header["typ"] = json!(["at+jwt"])),
        ("nonce", |_, claims| claims["nonce"] = json!("n")),
        ("at_hash", |_, claims| claims["at_hash"] = json!("h")),
        ("events", |_, claims| claims["events"] = json!({})),
        ("no client", |_, claims| remove(claims, "client_id")),
        ("no jti", |_, claims| remove(claims, "jti")),
        ("no sub", |_, claims| remove(claims, "sub")),
        ("empty sub", |_, claims| claims["sub"] = json!("")),
    ]);
    let mut lenient = pins();
    lenient.require_at_jwt_typ = false;
    for (kind, fits) in
        [(Some("JWT"), true), (None, true), (Some("dpop+jwt"), false), (Some("logout+jwt"), false)]
    {
        let token = key.access(|header, _| match kind {
            Some(kind) => header["typ"] = kind.into(),
            None => remove(header, "typ"),
        });
        assert_eq!(access(&lenient, &key.keys(), &token).is_ok(), fits, "{kind:?}");
    }
    let id_token = key.access(|header, claims| {
        header["typ"] = json!("JWT");
        claims["nonce"] = json!("n");
    });
    assert!(matches!(access(&lenient, &key.keys(), &id_token), Err(JwtError::Type)));
}

#[test]
fn gateway_14_size_and_form() {
    let key = TestKey::new("k1");
    let good = key.access(|_, _| {});
    for bad in [
        format!("{good}.x"),
        format!("{good}="),
        format!(" {good}"),
        good.replacen('.', "..", 1),
        String::new(),
    ] {
        assert!(matches!(access(&pins(), &key.keys(), &bad), Err(JwtError::Form(_))), "{bad}");
    }
    refuse(&[
        ("large", |_, claims| claims["pad"] = json!("x".repeat(8 * 1024))),
        ("wide header", |header, _| header["pad"] = json!("x".repeat(1024))),
        ("nested", |header, _| header["cty"] = json!("JWT")),
        ("encrypted", |header, _| header["enc"] = json!("A256GCM")),
    ]);
}

#[test]
fn gateway_15_es256_is_64_raw_bytes_and_never_zero() {
    let key = TestKey::new("k1");
    let good = key.access(|_, _| {});
    let (input, signature) = good.rsplit_once('.').unwrap();
    let raw = jws::decode(signature).unwrap();
    assert_eq!(raw.len(), 64);
    let random = ring::rand::SystemRandom::new();
    let asn1 = ring::signature::EcdsaKeyPair::from_pkcs8(
        &ring::signature::ECDSA_P256_SHA256_ASN1_SIGNING,
        &key.pkcs8,
        &random,
    );
    let der = asn1.unwrap().sign(&random, input.as_bytes()).unwrap().as_ref().to_vec();
    let order = [
        0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xbc, 0xe6, 0xfa,
        0xad, 0xa7, 0x17, 0x9e, 0x84, 0xf3, 0xb9, 0xca, 0xc2, 0xfc, 0x63, 0x25, 0x51,
    ];
    let (r, s) = raw.split_at(32);
    let zero = [0; 32];
    let bad: Vec<Vec<u8>> = vec![
        der,
        [&zero[..], s].concat(),
        [r, &zero[..]].concat(),
        vec![0; 64],
        [&order[..], s].concat(),
        [r, &order[..]].concat(),
        [&[0][..], &raw].concat(),
        raw[..63].to_vec(),
        Vec::new(),
    ];
    for signature in bad {
        let token = format!("{input}.{}", jws::encode(&signature));
        assert!(matches!(access(&pins(), &key.keys(), &token), Err(JwtError::Signature)), "{signature:x?}");
    }
}

#[test]
fn gateway_15_ed25519_and_rsa_tokens_verify_where_they_are_pinned() {
    let random = ring::rand::SystemRandom::new();
    let pkcs8 = Ed25519KeyPair::generate_pkcs8(&random).unwrap();
    let ed = Ed25519KeyPair::from_pkcs8(pkcs8.as_ref()).unwrap();
    let ed_jwk = json!({"kty": "OKP", "crv": "Ed25519", "x": jws::encode(ed.public_key()), "kid": "ed"});

    let made = aws_lc_rs::rsa::KeyPair::generate(aws_lc_rs::rsa::KeySize::Rsa2048).unwrap();
    let der: aws_lc_rs::encoding::Pkcs8V1Der<'_> = aws_lc_rs::encoding::AsDer::as_der(&made).unwrap();
    let rsa = ring::rsa::KeyPair::from_pkcs8(der.as_ref()).unwrap();
    let parts = ring::rsa::PublicKeyComponents::<Vec<u8>>::from(rsa.public());
    let rsa_jwk = json!({"kty": "RSA", "n": jws::encode(&parts.n), "e": jws::encode(&parts.e), "kid": "rsa"});

    let keys = KeySet::parse(json!({"keys": [ed_jwk, rsa_jwk]}).to_string().as_bytes()).unwrap();
    let input = |alg: &str, kid: &str| {
        let header = json!({"typ": "at+jwt", "alg": alg, "kid": kid}).to_string();
        format!("{}.{}", jws::encode(header), jws::encode(access_claims().to_string()))
    };
    let sign_rsa = |padding: &'static dyn ring::signature::RsaEncoding, input: &str| {
        let mut signature = vec![0; rsa.public().modulus_len()];
        rsa.sign(padding, &random, input.as_bytes(), &mut signature).unwrap();
        format!("{input}.{}", jws::encode(signature))
    };
    let ed_input = input("EdDSA", "ed");
    let ed_token = format!("{ed_input}.{}", jws::encode(ed.sign(ed_input.as_bytes())));
    let rs_token = sign_rsa(&ring::signature::RSA_PKCS1_SHA256, &input("RS256", "rsa"));
    let ps_token = sign_rsa(&ring::signature::RSA_PSS_SHA256, &input("PS256", "rsa"));
    let crossed = sign_rsa(&ring::signature::RSA_PKCS1_SHA256, &input("RS256", "ed"));

    let mut pins = pins();
    assert!(access(&pins, &keys, &ed_token).is_err() && access(&pins, &keys, &rs_token).is_err());
    pins.algorithms = vec![Algorithm::EdDsa, Algorithm::Rs256, Algorithm::Ps256];
    for token in [&ed_token, &rs_token, &ps_token] {
        assert!(access(&pins, &keys, token).is_ok());
    }
    assert!(matches!(access(&pins, &keys, &crossed), Err(JwtError::Algorithm)));
}

#[test]
fn gateway_17_18_a_token_bound_to_a_key_is_no_bearer_token() {
    refuse(&[
        ("dpop", |_, claims| claims["cnf"] = json!({"jkt": "x"})),
        ("mtls", |_, claims| claims["cnf"] = json!({"x5t#S256": "x"})),
        ("empty", |_, claims| claims["cnf"] = json!({})),
    ]);
}

fn id_claims(access: &str) -> Value {
    json!({
        "iss": ISSUER, "sub": "alice", "aud": "gateway", "iat": NOW, "exp": NOW + 300, "nonce": "n",
        "at_hash": half_hash(Algorithm::Es256, access), "auth_time": NOW,
    })
}

#[test]
fn gateway_11_13_id_tokens_are_for_this_client_this_login_and_this_access_token() {
    let key = TestKey::new("k1");
    let header = json!({"typ": "JWT", "alg": "ES256", "kid": "k1"});
    let read = |header: &Value, claims: &Value, nonce: Option<&str>| {
        let token = key.sign(header, claims);
        pins().id_token(&Compact::parse(&token).unwrap(), &key.keys(), now(), nonce, "access")
    };
    let good = id_claims("access");
    assert_eq!(read(&header, &good, Some("n")).unwrap().subject, "alice");
    assert!(read(&header, &good, None).is_ok());
    let cases: &[(&str, Change)] = &[
        ("aud", |_, claims| claims["aud"] = json!("bank")),
        ("azp of another", |_, claims| claims["azp"] = json!("cli")),
        ("two audiences, no azp", |_, claims| claims["aud"] = json!(["gateway", "x"])),
        ("nonce", |_, claims| claims["nonce"] = json!("m")),
        ("no nonce", |_, claims| remove(claims, "nonce")),
        ("at_hash", |_, claims| claims["at_hash"] = json!(half_hash(Algorithm::Es256, "other"))),
        ("at_hash null", |_, claims| claims["at_hash"] = json!(null)),
        ("expired", |_, claims| claims["exp"] = json!(NOW)),
        ("access token", |header, _| header["typ"] = json!("at+jwt")),
        ("logout token", |header, _| header["typ"] = json!("logout+jwt")),
        ("events", |_, claims| claims["events"] = json!({})),
        ("none", |header, _| header["alg"] = json!("none")),
        ("iss", |_, claims| claims["iss"] = json!("https://evil.example")),
        ("no sub", |_, claims| remove(claims, "sub")),
    ];
    for (name, change) in cases {
        let (mut header, mut claims) = (header.clone(), good.clone());
        change(&mut header, &mut claims);
        assert!(read(&header, &claims, Some("n")).is_err(), "{name}");
    }
    let both = json!({"aud": ["gateway", "x"], "azp": "gateway"});
    let mut claims = good;
    claims.as_object_mut().unwrap().extend(both.as_object().unwrap().clone());
    assert!(read(&header, &claims, Some("n")).is_ok());
}
