//! What is to be captured: as it is written on the command line or in `[capture]`, and as it is meant.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::num::NonZeroU16;
use std::path::{Path, PathBuf};

use clap::Parser as _;
use ipnet::IpNet;
use schemars::JsonSchema;
use serde::Deserialize;

use crate::failure::Failure;

/// A comment of nftables holds so many bytes, and each option is kept in one.
const MAX_COMMENT_BYTES: usize = 127;
/// Levels of the cgroup tree that `socket cgroupv2 level` can name (NFT_SOCKET_CGROUPV2 is one byte).
const MAX_CGROUP_LEVELS: usize = 255;
/// Where nft looks for the cgroup tree.
const CGROUP_ROOT: &str = "/sys/fs/cgroup";
const DNS: u16 = 53;
const SSH: u16 = 22;

/// What is to be captured, as it is written.
#[derive(Debug, Clone, Default, PartialEq, Eq, clap::Args, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Wanted {
    /// Bring TCP connections of this host's processes to this port of the sidecar, on loopback.
    #[arg(long, value_name = "PORT")]
    pub(crate) outbound_port: Option<NonZeroU16>,
    /// Bring TCP connections from other hosts to this port of the sidecar, on loopback.
    #[arg(long, value_name = "PORT")]
    pub(crate) inbound_port: Option<NonZeroU16>,
    /// The user that the sidecar runs as, and nothing else does: its connections are not captured.
    #[arg(long, value_name = "USER")]
    pub(crate) uid: Option<String>,
    /// The group that the sidecar runs as, where that tells it from others.
    #[arg(long, value_name = "GROUP")]
    pub(crate) gid: Option<String>,
    /// The sidecar's port for other sidecars: not captured.
    #[arg(long, value_name = "PORT")]
    pub(crate) mesh_port: Option<NonZeroU16>,
    /// The sidecar's admin port: not captured.
    #[arg(long, value_name = "PORT")]
    pub(crate) admin_port: Option<NonZeroU16>,
    /// A user that the app runs as. Default: everybody but the sidecar is the app.
    #[arg(long = "app-uid", alias = "app-uids", value_name = "USER", value_delimiter = ',')]
    pub(crate) app_uids: Vec<String>,
    /// A port that the app listens on. Default: what comes to any port is for the app.
    #[arg(long = "app-port", alias = "app-ports", value_name = "PORT", value_delimiter = ',')]
    pub(crate) app_ports: Vec<NonZeroU16>,
    /// A loopback port on which the sidecar takes the app's calls, for --guard-loopback.
    #[arg(long = "call-port", alias = "call-ports", value_name = "PORT", value_delimiter = ',')]
    pub(crate) call_ports: Vec<NonZeroU16>,
    /// Connections to this port of other hosts are not captured.
    #[arg(
        long = "exclude-outbound-port",
        alias = "exclude-outbound-ports",
        value_name = "PORT",
        value_delimiter = ','
    )]
    pub(crate) exclude_outbound_ports: Vec<NonZeroU16>,
    /// Connections to this port of this host are not captured.
    #[arg(
        long = "exclude-inbound-port",
        alias = "exclude-inbound-ports",
        value_name = "PORT",
        value_delimiter = ','
    )]
    pub(crate) exclude_inbound_ports: Vec<NonZeroU16>,
    /// Connections of this user are not captured.
    #[arg(long = "exclude-uid", alias = "exclude-uids", value_name = "USER", value_delimiter = ',')]
    pub(crate) exclude_uids: Vec<String>,
    /// Connections out of this cgroup (v2) and those below it are not captured, such as system.slice/ntp.service.
    #[arg(long = "exclude-cgroup", alias = "exclude-cgroups", value_name = "PATH")]
    pub(crate) exclude_cgroups: Vec<String>,
    /// Connections to these addresses are not captured.
    #[arg(long = "exclude-cidr", alias = "exclude-cidrs", value_name = "CIDR", value_delimiter = ',')]
    pub(crate) exclude_cidrs: Vec<String>,
    /// Addresses routed to this host without being set on it, whose connections are captured too.
    #[arg(long = "virtual-cidr", alias = "virtual-cidrs", value_name = "CIDR", value_delimiter = ',')]
    pub(crate) virtual_cidrs: Vec<String>,
    /// Let only the app reach the sidecar's loopback ports, and only the sidecar the app's ports.
    #[arg(long)]
    pub(crate) guard_loopback: bool,
    /// Capture DNS over TCP (port 53) too, which otherwise passes.
    #[arg(long)]
    pub(crate) capture_dns: bool,
    /// Capture port 22 of this host too, which otherwise passes so that nobody locks himself out.
    #[arg(long)]
    pub(crate) capture_ssh: bool,
}

/// What is to be captured, in numbers, and without contradictions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) outbound_port: Option<u16>,
    pub(super) inbound_port: Option<u16>,
    pub(super) uid: Option<u32>,
    pub(super) gid: Option<u32>,
    pub(super) mesh_port: Option<u16>,
    pub(super) admin_port: Option<u16>,
    pub(super) app_uids: BTreeSet<u32>,
    pub(super) app_ports: BTreeSet<u16>,
    pub(super) call_ports: BTreeSet<u16>,
    pub(super) exclude_outbound_ports: BTreeSet<u16>,
    pub(super) exclude_inbound_ports: BTreeSet<u16>,
    pub(super) exclude_uids: BTreeSet<u32>,
    pub(super) exclude_cgroups: BTreeSet<Cgroup>,
    pub(super) exclude_cidrs: Vec<IpNet>,
    pub(super) virtual_cidrs: Vec<IpNet>,
    pub(super) guard_loopback: bool,
    pub(super) capture_dns: bool,
    pub(super) capture_ssh: bool,
}

/// A cgroup of the v2 tree.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Cgroup {
    /// Below the root of the v2 tree.
    pub(super) path: String,
    /// Below /sys/fs/cgroup, which is what nft wants; not the same where v1 and v2 are mounted side by side.
    pub(super) nft_path: String,
    pub(super) level: usize,
}

impl Plan {
    /// What `wanted` means, or what is wrong with it.
    pub(super) fn new(wanted: &Wanted) -> Result<Self, Failure> {
        let plan = Self {
            outbound_port: wanted.outbound_port.map(NonZeroU16::get),
            inbound_port: wanted.inbound_port.map(NonZeroU16::get),
            uid: wanted.uid.as_deref().map(user).transpose()?,
            gid: wanted.gid.as_deref().map(group).transpose()?,
            mesh_port: wanted.mesh_port.map(NonZeroU16::get),
            admin_port: wanted.admin_port.map(NonZeroU16::get),
            app_uids: wanted.app_uids.iter().map(|name| user(name)).collect::<Result<_, _>>()?,
            app_ports: ports(&wanted.app_ports),
            call_ports: ports(&wanted.call_ports),
            exclude_outbound_ports: ports(&wanted.exclude_outbound_ports),
            exclude_inbound_ports: ports(&wanted.exclude_inbound_ports),
            exclude_uids: wanted.exclude_uids.iter().map(|name| user(name)).collect::<Result<_, _>>()?,
            exclude_cgroups: cgroups(&wanted.exclude_cgroups)?,
            exclude_cidrs: networks("--exclude-cidr", &wanted.exclude_cidrs)?,
            virtual_cidrs: networks("--virtual-cidr", &wanted.virtual_cidrs)?,
            guard_loopback: wanted.guard_loopback,
            capture_dns: wanted.capture_dns,
            capture_ssh: wanted.capture_ssh,
        };
        plan.check()?;
        Ok(plan)
    }

    /// What `words` say that `on` was told.
    pub(super) fn read(words: &[String]) -> Result<Self, Failure> {
        #[derive(clap::Parser)]
        #[command(no_binary_name = true)]
        struct Written {
            #[command(flatten)]
            wanted: Wanted,
        }
        let words = words.iter().flat_map(|word| match word.split_once(' ') {
            Some((option, value)) => vec![option, value],
            None => vec![word.as_str()],
        });
        let written = Written::try_parse_from(words)
            .map_err(|error| Failure::invalid("cannot read which options were in force").because(&error))?;
        Self::new(&written.wanted)
    }

    /// The options that mean this, one a word group.
    pub(super) fn words(&self) -> Vec<String> {
        let mut words = Vec::new();
        say(&mut words, "outbound-port", self.outbound_port);
        say(&mut words, "inbound-port", self.inbound_port);
        say(&mut words, "uid", self.uid);
        say(&mut words, "gid", self.gid);
        say(&mut words, "mesh-port", self.mesh_port);
        say(&mut words, "admin-port", self.admin_port);
        say(&mut words, "app-uid", &self.app_uids);
        say(&mut words, "app-port", &self.app_ports);
        say(&mut words, "call-port", &self.call_ports);
        say(&mut words, "exclude-outbound-port", &self.exclude_outbound_ports);
        say(&mut words, "exclude-inbound-port", &self.exclude_inbound_ports);
        say(&mut words, "exclude-uid", &self.exclude_uids);
        say(&mut words, "exclude-cgroup", self.exclude_cgroups.iter().map(|cgroup| &cgroup.path));
        say(&mut words, "exclude-cidr", &self.exclude_cidrs);
        say(&mut words, "virtual-cidr", &self.virtual_cidrs);
        for (set, option) in [
            (self.guard_loopback, "--guard-loopback"),
            (self.capture_dns, "--capture-dns"),
            (self.capture_ssh, "--capture-ssh"),
        ] {
            words.extend(set.then(|| option.to_owned()));
        }
        words
    }

    /// Ports of other hosts that pass.
    pub(super) fn passing_outbound_ports(&self) -> BTreeSet<u16> {
        let dns = (!self.capture_dns).then_some(DNS);
        self.exclude_outbound_ports.iter().copied().chain(dns).collect()
    }

    /// Ports of this host that pass.
    pub(super) fn passing_inbound_ports(&self) -> BTreeSet<u16> {
        let ssh = (!self.capture_ssh).then_some(SSH);
        let own = [self.mesh_port, self.admin_port];
        self.exclude_inbound_ports.iter().copied().chain(own.into_iter().flatten()).chain(ssh).collect()
    }

    fn check(&self) -> Result<(), Failure> {
        let wrong = |message: &str, hint: &str| Err(Failure::usage(message).hint(hint));
        if self.outbound_port.is_none() && self.inbound_port.is_none() && !self.guard_loopback {
            return wrong(
                "there is nothing to capture",
                "give --outbound-port, --inbound-port, --guard-loopback or several of them",
            );
        }
        if self.outbound_port.is_some() && self.outbound_port == self.inbound_port {
            return wrong(
                "outbound and inbound connections cannot come to the same port",
                "the sidecar tells them apart by it",
            );
        }
        let known = self.uid.is_some() || self.gid.is_some();
        if self.outbound_port.is_some() && !known {
            return wrong(
                "nothing tells the sidecar's own connections from the app's: they would come back to it for ever",
                "say what it runs as: --uid USER, or --gid GROUP",
            );
        }
        if let Some(uid) = self.uid.filter(|uid| self.app_uids.contains(uid)) {
            return Err(Failure::usage(format!("app and sidecar are both said to run as user {uid}"))
                .hint("what the app dials could not be told from what the sidecar dials: give each a user"));
        }
        if let Some(port) = self.inbound_port.filter(|port| self.app_ports.contains(port)) {
            return Err(Failure::usage(format!(
                "port {port} is said to be both the app's and the sidecar's"
            ))
            .hint("--inbound-port is where the sidecar listens, --app-port where the app does"));
        }
        if self.guard_loopback && (self.uid.is_none() || self.app_uids.is_empty()) {
            return wrong(
                "--guard-loopback needs to know who the sidecar and who the app is",
                "give both --uid and --app-uid",
            );
        }
        let guarded =
            self.outbound_port.is_some() || !self.call_ports.is_empty() || !self.app_ports.is_empty();
        if self.guard_loopback && !guarded {
            return wrong("--guard-loopback has no port to guard", "give --app-port, --call-port or both");
        }
        if let Some(long) = self.words().iter().find(|word| word.len() > MAX_COMMENT_BYTES) {
            return Err(Failure::usage(format!("`{long}` is longer than {MAX_COMMENT_BYTES} bytes"))
                .hint("each option is kept as a comment of the rules, which holds no more"));
        }
        Ok(())
    }
}

fn say(words: &mut Vec<String>, option: &str, values: impl IntoIterator<Item: Display>) {
    words.extend(values.into_iter().map(|value| format!("--{option} {value}")));
}

fn ports(ports: &[NonZeroU16]) -> BTreeSet<u16> {
    ports.iter().map(|port| port.get()).collect()
}

fn user(name: &str) -> Result<u32, Failure> {
    id("user", name, |name| Ok(nix::unistd::User::from_name(name)?.map(|user| user.uid.as_raw())))
}

fn group(name: &str) -> Result<u32, Failure> {
    id("group", name, |name| Ok(nix::unistd::Group::from_name(name)?.map(|group| group.gid.as_raw())))
}

fn id(
    kind: &str,
    name: &str,
    look_up: impl FnOnce(&str) -> Result<Option<u32>, nix::errno::Errno>,
) -> Result<u32, Failure> {
    if let Ok(number) = name.parse() {
        return Ok(number);
    }
    match look_up(name) {
        Ok(Some(number)) => Ok(number),
        Ok(None) => Err(Failure::usage(format!("this host has no {kind} `{name}`")).hint(format!(
            "give a name that `getent {}` knows, or a number",
            if kind == "user" { "passwd" } else { kind }
        ))),
        Err(error) => Err(Failure::new(format!("cannot look up the {kind} `{name}`")).because(&error)),
    }
}

fn networks(option: &str, texts: &[String]) -> Result<Vec<IpNet>, Failure> {
    let read = |text: &String| -> Result<IpNet, Failure> {
        let read = text.parse::<IpNet>().or_else(|_| text.parse::<std::net::IpAddr>().map(IpNet::from));
        let network = read.map_err(|_| {
            Failure::usage(format!("{option}: `{text}` is neither an address nor a CIDR"))
                .hint("such as 192.0.2.7, 10.0.0.0/8 or 2001:db8::/32")
        })?;
        if network.trunc() != network {
            return Err(Failure::usage(format!("{option}: {text} has bits set below its prefix"))
                .hint(format!("the network is {}", network.trunc())));
        }
        Ok(network)
    };
    // Together and in order, so that the same addresses are always the same rules.
    Ok(IpNet::aggregate(&texts.iter().map(read).collect::<Result<_, _>>()?))
}

fn cgroups(paths: &[String]) -> Result<BTreeSet<Cgroup>, Failure> {
    if paths.is_empty() {
        return Ok(BTreeSet::new());
    }
    let mounts = std::fs::read_to_string("/proc/self/mounts")
        .map_err(|error| Failure::new("cannot read /proc/self/mounts").because(&error))?;
    let root = v2_root(&mounts).ok_or_else(|| {
        Failure::new("--exclude-cgroup: this host has no cgroup v2 tree below /sys/fs/cgroup")
            .hint("without it the kernel cannot tell connections by cgroup; use --exclude-uid")
    })?;
    paths.iter().map(|path| cgroup(path, &root)).collect()
}

/// Where the v2 tree is mounted: alone at /sys/fs/cgroup, or beside v1 in a directory below.
fn v2_root(mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let (mounted, kind) = (fields.next()?, fields.next()?);
        (kind == "cgroup2" && Path::new(mounted).starts_with(CGROUP_ROOT)).then(|| PathBuf::from(mounted))
    })
}

fn cgroup(written: &str, root: &Path) -> Result<Cgroup, Failure> {
    let wrong = |why: String| Failure::usage(format!("--exclude-cgroup: {why}"));
    let path = written.trim_matches('/');
    let plain = |part: &str| {
        !part.is_empty()
            && part != "."
            && part != ".."
            && part.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'"')
    };
    let level = path.split('/').count();
    if !path.split('/').all(plain) || level > MAX_CGROUP_LEVELS {
        return Err(wrong(format!("`{written}` is no cgroup")).hint("such as system.slice/chrony.service"));
    }
    let full = root.join(path);
    if !full.is_dir() {
        return Err(wrong(format!("there is no cgroup {}", full.display()))
            .hint("rules hold a cgroup by its number: it has to be there first, and `on` again when it was made anew"));
    }
    let nft_path =
        full.strip_prefix(CGROUP_ROOT).map_or_else(|_| path.to_owned(), |path| path.display().to_string());
    Ok(Cgroup { path: path.to_owned(), nft_path, level })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn refused(wanted: Wanted) -> String {
        Plan::new(&wanted).unwrap_err().message
    }

    fn outbound() -> Wanted {
        Wanted { outbound_port: NonZeroU16::new(15001), uid: Some("990".to_owned()), ..Wanted::default() }
    }

    #[test]
    fn what_contradicts_itself_is_refused_with_the_reason() {
        let port = NonZeroU16::new;
        assert_eq!(refused(Wanted::default()), "there is nothing to capture");
        let without_uid = Wanted { uid: None, ..outbound() };
        assert!(refused(without_uid).contains("come back to it for ever"));
        let same_port = Wanted { inbound_port: port(15001), ..outbound() };
        assert!(refused(same_port).contains("the same port"));
        let same_user = Wanted { app_uids: vec!["990".to_owned()], ..outbound() };
        assert!(refused(same_user).contains("both said to run as user 990"));
        let unknown_app = Wanted { guard_loopback: true, ..outbound() };
        assert!(refused(unknown_app).contains("who the app is"));
        let nobody = Wanted { exclude_uids: vec!["no such user".to_owned()], ..outbound() };
        assert_eq!(refused(nobody), "this host has no user `no such user`");
        let host_bits = Wanted { exclude_cidrs: vec!["10.1.0.0/8".to_owned()], ..outbound() };
        assert!(refused(host_bits).contains("bits set below its prefix"));
        let climbing = cgroup("a/../b", Path::new(CGROUP_ROOT)).unwrap_err().message;
        assert!(climbing.contains("is no cgroup"));
    }

    #[test]
    fn users_may_be_named() {
        let root = Wanted { uid: Some("root".to_owned()), ..outbound() };
        assert_eq!(Plan::new(&root).unwrap().uid, Some(0));
    }

    #[test]
    fn the_v2_tree_is_found_alone_and_beside_v1_and_nowhere() {
        let alone = "proc /proc proc rw 0 0\ncgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n";
        assert_eq!(v2_root(alone).unwrap(), Path::new("/sys/fs/cgroup"));
        let beside =
            "cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert_eq!(v2_root(beside).unwrap(), Path::new("/sys/fs/cgroup/unified"));
        assert_eq!(v2_root("cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n"), None);
    }

    #[test]
    fn dns_and_ssh_pass_unless_asked_for_and_so_do_the_sidecars_own_ports() {
        let wanted =
            Wanted { mesh_port: NonZeroU16::new(9443), admin_port: NonZeroU16::new(9901), ..outbound() };
        let plan = Plan::new(&wanted).unwrap();
        assert_eq!(plan.passing_outbound_ports(), BTreeSet::from([53]));
        assert_eq!(plan.passing_inbound_ports(), BTreeSet::from([22, 9443, 9901]));
        let plan = Plan::new(&Wanted { capture_dns: true, capture_ssh: true, ..wanted }).unwrap();
        assert_eq!(plan.passing_outbound_ports(), BTreeSet::new());
        assert_eq!(plan.passing_inbound_ports(), BTreeSet::from([9443, 9901]));
    }

    prop_compose! {
        fn any_wanted()(
            ports in proptest::collection::vec(1u16.., 4..12),
            uids in proptest::collection::vec(1000u32.., 0..4),
            addresses in proptest::collection::vec((any::<u128>(), 0u8..=128, any::<bool>()), 0..4),
            flags: [bool; 3],
        ) -> Wanted {
            let port = |index: usize| ports.get(index).copied().and_then(NonZeroU16::new);
            let rest: Vec<NonZeroU16> = (4..ports.len()).filter_map(port).collect();
            let names: Vec<String> = uids.iter().map(ToString::to_string).collect();
            let cidrs = addresses.iter().map(|(address, prefix, v6)| {
                let net = if *v6 {
                    IpNet::new(std::net::Ipv6Addr::from(*address).into(), *prefix)
                } else {
                    IpNet::new(std::net::Ipv4Addr::from(*address as u32).into(), *prefix % 33)
                };
                net.unwrap().trunc().to_string()
            });
            Wanted {
                outbound_port: port(0), inbound_port: port(1), mesh_port: port(2), admin_port: port(3),
                uid: Some("990".to_owned()), gid: names.first().cloned(),
                app_uids: names.clone(), exclude_uids: names,
                app_ports: rest.clone(), call_ports: rest.clone(),
                exclude_outbound_ports: rest.clone(), exclude_inbound_ports: rest,
                exclude_cidrs: cidrs.clone().collect(), virtual_cidrs: cidrs.collect(),
                guard_loopback: flags[0], capture_dns: flags[1], capture_ssh: flags[2],
                ..Wanted::default()
            }
        }
    }

    proptest! {
        #[test]
        fn what_is_written_into_the_rules_reads_back_as_the_same_plan(wanted in any_wanted()) {
            if let Ok(plan) = Plan::new(&wanted) {
                prop_assert_eq!(Plan::read(&plan.words()).unwrap(), plan);
            }
        }
    }
}
