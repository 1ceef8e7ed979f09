//! What was configured: the target as the control plane owns it. Pure: no I/O, no clock, no randomness.
//!
//! # Invariants
//! - An edit is checked as a whole before anything of it is done: a refused edit changes nothing.
//! - Every edit that reactors can see makes a new generation of the view; one that a discovery log can show makes a new
//!   discovery generation too, and no other does.
//! - What an edit does not touch is shared with the views that were made before it, so that a view costs little and
//!   reactors can tell by identity what has not changed.
//! - Incarnations are never reused, so that a subsystem or namespace that was deleted and made again is a new one.

mod checks;
pub mod error;
pub mod names;
pub mod options;
mod save;
mod shapes;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bdev::core::{BdevInfo, Geometry};
use serde_json::{Value, json};
use uuid::Uuid;

use super::view::{
    AnaState, DISCOVERY_NQN, DiscoveryFilter, ListenAddress, ListenerView, NamespaceView, Referral, SubsystemView,
    TargetView, TransportKind, TransportOptions,
};
use checks::{check_port, check_referral, free_nsid, no_listener, unique};
pub use error::{ModelError, ModelErrorKind};
use names::{MAX_MODEL_BYTES, MAX_SERIAL_BYTES, check_ascii, check_nqn, derived_serial};
pub use save::ADMIN_CMD_PASSTHRU;
pub use shapes::{address_json, hex, shown_namespace};

/// Model number of a subsystem that was given none.
pub const DEFAULT_MODEL_NUMBER: &str = "Ringstone Controller";
/// Namespaces of a subsystem that was not told how many.
pub const DEFAULT_MAX_NAMESPACES: u32 = 32;
/// Namespaces that a subsystem can be made for.
pub const MAX_NAMESPACES: u32 = 16384;
/// Largest controller identifier (Base 3.1.2.5: FFF0h and up are reserved).
pub const MAX_CNTLID: u16 = 0xFFEF;
/// Hosts that one subsystem can name.
pub const MAX_HOSTS: usize = 4096;
/// Addresses that the target can listen on.
pub const MAX_ADDRESSES: usize = 1024;
/// Other discovery services that the target can refer to.
pub const MAX_REFERRALS: usize = 256;
/// Subsystems that a target is made for unless told otherwise.
const DEFAULT_MAX_SUBSYSTEMS: u32 = 1024;
/// Largest number of subsystems that it can be told.
const MAX_SUBSYSTEMS: u32 = 65535;
/// SPDK's limit, which hosts then see: 1 GiB of 512 byte blocks.
const DEFAULT_DMRSL: u32 = 2_097_152;
/// SPDK's limit: 2^12 pages of 4 KiB, 16 MiB.
const DEFAULT_WZSL: u8 = 12;

/// Names one namespace for as long as the process runs.
pub type Incarnation = u64;

/// `nvmf_create_subsystem`. What is `None` takes its default.
#[derive(Clone, Debug, Default)]
pub struct NewSubsystem {
    /// Its NQN.
    pub nqn: String,
    /// Serial number; derived from the NQN when absent.
    pub serial_number: Option<String>,
    /// Model number.
    pub model_number: Option<String>,
    /// A label for administrators, shown and saved.
    pub admin_label: Option<String>,
    /// Whether any host may connect.
    pub allow_any_host: bool,
    /// Largest NSID; 0 is the default too.
    pub max_namespaces: Option<u32>,
    /// Whether asymmetric namespace access is reported.
    pub ana_reporting: bool,
    /// Smallest controller identifier.
    pub min_cntlid: Option<u16>,
    /// Largest controller identifier.
    pub max_cntlid: Option<u16>,
    /// Dataset management range limit, in blocks.
    pub dmrsl: Option<u32>,
    /// Write zeroes size limit, a power of two in units of 4 KiB.
    pub wzsl: Option<u8>,
}

/// `nvmf_subsystem_add_ns`, apart from the device. What is `None` takes its default.
#[derive(Clone, Debug, Default)]
pub struct NewNamespace {
    /// Its identifier; the lowest free one when absent or 0.
    pub nsid: Option<u32>,
    /// Its UUID; the device's when absent.
    pub uuid: Option<Uuid>,
    /// Namespace globally unique identifier; the UUID's bytes when absent.
    pub nguid: Option<[u8; 16]>,
    /// IEEE extended unique identifier.
    pub eui64: Option<[u8; 8]>,
    /// ANA group; the NSID when absent or 0.
    pub anagrpid: Option<u32>,
}

/// A listener to add.
#[derive(Clone, Debug)]
pub struct NewListener {
    /// Where.
    pub address: ListenAddress,
    /// State of all ANA groups; optimized when absent.
    pub ana_state: Option<AnaState>,
    /// Name of the socket implementation that was asked for; kept for saving.
    pub sock_impl: Option<String>,
}

/// `nvmf_set_config`, as far as it is only kept, shown and saved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// What discovery logs are filtered by.
    pub discovery_filter: DiscoveryFilter,
    /// Digests for DH-HMAC-CHAP.
    pub dhchap_digests: Vec<String>,
    /// Groups for DH-HMAC-CHAP.
    pub dhchap_dhgroups: Vec<String>,
    /// Largest number of subsystems, with the discovery subsystem.
    pub max_subsystems: u32,
    /// Command retry delay times, in units of 100 ms.
    pub crdt: [u16; 3],
}

/// Digests that `nvmf_set_config` knows.
pub const DHCHAP_DIGESTS: &[&str] = &["sha256", "sha384", "sha512"];
/// Groups that `nvmf_set_config` knows.
pub const DHCHAP_DHGROUPS: &[&str] = &["null", "ffdhe2048", "ffdhe3072", "ffdhe4096", "ffdhe6144", "ffdhe8192"];

impl Default for Settings {
    fn default() -> Self {
        let words = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect();
        Settings {
            discovery_filter: DiscoveryFilter::default(),
            dhchap_digests: words(DHCHAP_DIGESTS),
            dhchap_dhgroups: words(DHCHAP_DHGROUPS),
            max_subsystems: DEFAULT_MAX_SUBSYSTEMS,
            crdt: [0; 3],
        }
    }
}

/// A subsystem: what reactors see, and what they need not.
#[derive(Clone, Debug)]
pub struct Subsystem {
    view: Arc<SubsystemView>,
    admin_label: Option<String>,
    sock_impls: BTreeMap<ListenAddress, String>,
}

impl Subsystem {
    /// What reactors see of it.
    pub fn view(&self) -> &SubsystemView {
        &self.view
    }

    /// A label for administrators.
    pub fn admin_label(&self) -> Option<&str> {
        self.admin_label.as_deref()
    }

    fn edit(&mut self) -> &mut SubsystemView {
        Arc::make_mut(&mut self.view)
    }

    fn ana_reporting(&self, field: &'static str, value: Value) -> Result<(), ModelError> {
        if self.view.ana_reporting {
            return Ok(());
        }
        let reason = format!("subsystem {} does not report asymmetric namespace access", self.view.nqn);
        Err(ModelError::invalid(field, value, reason, "create the subsystem with ana_reporting = true"))
    }

    fn group(&self, field: &'static str, group: u32) -> Result<(), ModelError> {
        let max = self.view.max_namespaces;
        if (1..=max).contains(&group) {
            return Ok(());
        }
        Err(ModelError::invalid(field, group, "no such ANA group", format!("give 1 to {max}, the subsystem's limit")))
    }
}

/// The target as it is configured.
#[derive(Debug, Default)]
pub struct Model {
    transports: BTreeMap<TransportKind, TransportOptions>,
    subsystems: BTreeMap<String, Subsystem>,
    discovery: Vec<ListenAddress>,
    discovery_sock_impls: BTreeMap<ListenAddress, String>,
    referrals: Vec<Referral>,
    settings: Settings,
    port_ids: BTreeMap<ListenAddress, u16>,
    last_incarnation: Incarnation,
    generation: u64,
    discovery_generation: u64,
    /// What discovery logs showed as of the present discovery generation.
    shown: Shown,
}

/// Everything that a discovery log depends on.
#[derive(Clone, Debug, Default, PartialEq)]
struct Shown {
    filter: DiscoveryFilter,
    discovery: Vec<ListenAddress>,
    referrals: Vec<Referral>,
    /// The subsystems with a listener.
    subsystems: Vec<ShownSubsystem>,
}

#[derive(Clone, Debug, PartialEq)]
struct ShownSubsystem {
    nqn: String,
    /// Who may connect; `None`: anybody.
    hosts: Option<Vec<String>>,
    ports: Vec<(ListenAddress, u16)>,
}

/// Whether an NQN is one of the discovery service's: the well-known one, or the word that SPDK's client sends.
pub fn is_discovery(nqn: &str) -> bool {
    nqn == "discovery" || nqn == DISCOVERY_NQN
}

impl Model {
    /// A target without anything.
    pub fn new() -> Model {
        Model::default()
    }

    /// The transports.
    pub fn transports(&self) -> &BTreeMap<TransportKind, TransportOptions> {
        &self.transports
    }

    /// The NVM subsystems.
    pub fn subsystems(&self) -> &BTreeMap<String, Subsystem> {
        &self.subsystems
    }

    /// Addresses opened for the discovery service by name.
    pub fn discovery_listeners(&self) -> &[ListenAddress] {
        &self.discovery
    }

    /// The referrals.
    pub fn referrals(&self) -> &[Referral] {
        &self.referrals
    }

    /// The settings.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// An NVM subsystem.
    ///
    /// # Errors
    /// When there is none with this NQN.
    pub fn subsystem(&self, nqn: &str) -> Result<&Subsystem, ModelError> {
        self.subsystems.get(nqn).ok_or_else(|| self.no_subsystem(nqn))
    }

    fn subsystem_mut(&mut self, nqn: &str) -> Result<&mut Subsystem, ModelError> {
        if !self.subsystems.contains_key(nqn) {
            return Err(self.no_subsystem(nqn));
        }
        Ok(self.subsystems.get_mut(nqn).expect("just seen"))
    }

    fn no_subsystem(&self, nqn: &str) -> ModelError {
        if is_discovery(nqn) {
            let reason = "the discovery subsystem has listeners and referrals, and is open to any host; \
                          nothing else of it can be changed";
            return ModelError::invalid("nqn", nqn, reason, "name an NVM subsystem");
        }
        let fix = match schema::nearest(nqn, self.subsystems.keys().map(String::as_str)) {
            Some(near) => format!("did you mean {near}? nvmf_get_subsystems lists all"),
            None => "nvmf_get_subsystems lists those there are".into(),
        };
        ModelError::not_found("nqn", nqn, "there is no such subsystem", fix)
    }

    /// Draws the identity of a namespace that is going to be added.
    pub fn draw_incarnation(&mut self) -> Incarnation {
        self.last_incarnation += 1;
        self.last_incarnation
    }

    /// Ends an edit.
    fn edited(&mut self) {
        let open: BTreeSet<&ListenAddress> =
            self.subsystems.values().flat_map(|s| s.view.listeners.iter().map(|l| &l.address)).collect();
        self.port_ids.retain(|address, _| open.contains(address));
        self.generation += 1;
        let shown = self.shown_now();
        if shown != self.shown {
            self.shown = shown;
            self.discovery_generation += 1;
        }
    }

    fn shown_now(&self) -> Shown {
        let listening = self.subsystems.values().map(Subsystem::view).filter(|view| !view.listeners.is_empty());
        let subsystems = listening.map(|view| {
            let hosts = (!view.allow_any_host).then(|| view.hosts.clone());
            let ports = view.listeners.iter().map(|listener| (listener.address.clone(), listener.port_id)).collect();
            ShownSubsystem { nqn: view.nqn.clone(), hosts, ports }
        });
        Shown {
            filter: self.settings.discovery_filter,
            discovery: self.discovery.clone(),
            referrals: self.referrals.clone(),
            subsystems: subsystems.collect(),
        }
    }

    /// The target as reactors are to see it.
    pub fn view(&self) -> TargetView {
        TargetView {
            generation: self.generation,
            discovery_generation: self.discovery_generation,
            subsystems: self.subsystems.iter().map(|(nqn, s)| (nqn.clone(), Arc::clone(&s.view))).collect(),
            discovery_listeners: self.discovery.clone(),
            transports: self.transports.clone(),
            referrals: self.referrals.clone(),
            discovery_filter: self.settings.discovery_filter,
            crdt: self.settings.crdt,
        }
    }

    // Transports and settings.

    /// Adds a transport.
    ///
    /// # Errors
    /// When it is there already, or an option makes no sense.
    pub fn create_transport(&mut self, kind: TransportKind, options: TransportOptions) -> Result<(), ModelError> {
        if self.transports.contains_key(&kind) {
            let reason = format!("transport {} exists already", kind.name());
            let fix = "its options cannot be changed while the server runs: restart it with the new ones";
            return Err(ModelError::exists("trtype", kind.name(), reason, fix));
        }
        options::check(&options)?;
        self.transports.insert(kind, options);
        self.edited();
        Ok(())
    }

    /// Changes the settings.
    ///
    /// # Errors
    /// When there are more subsystems already than are to be allowed.
    pub fn set_settings(&mut self, settings: Settings) -> Result<(), ModelError> {
        // The discovery subsystem counts.
        let have = self.subsystems.len() as u32 + 1;
        if !(have..=MAX_SUBSYSTEMS).contains(&settings.max_subsystems) {
            let reason = format!("there are {have} subsystems, with that for discovery");
            let fix = format!("give {have} to {MAX_SUBSYSTEMS}");
            return Err(ModelError::invalid("max_subsystems", settings.max_subsystems, reason, fix));
        }
        self.settings = settings;
        self.edited();
        Ok(())
    }

    // Subsystems.

    /// Adds a subsystem.
    ///
    /// # Errors
    /// When its NQN is taken or a field makes no sense.
    pub fn create_subsystem(&mut self, new: NewSubsystem) -> Result<(), ModelError> {
        if is_discovery(&new.nqn) {
            let reason = "the discovery subsystem is always there";
            return Err(ModelError::exists("nqn", new.nqn, reason, "choose another NQN"));
        }
        check_nqn("nqn", &new.nqn)?;
        if self.subsystems.contains_key(&new.nqn) {
            let (reason, fix) = ("a subsystem with this NQN exists already", "choose another NQN, or delete that one");
            return Err(ModelError::exists("nqn", new.nqn, reason, fix));
        }
        let max = self.settings.max_subsystems;
        if self.subsystems.len() as u32 + 1 >= max {
            let reason = format!("there are {max} subsystems, with that for discovery, and no more are allowed");
            let fix = "delete one, or raise nvmf_set_max_subsystems before the start";
            return Err(ModelError::full("nqn", new.nqn, reason, fix));
        }
        let view = self.checked_subsystem(&new)?;
        self.last_incarnation += 1;
        let view = Arc::new(SubsystemView { incarnation: self.last_incarnation, ..view });
        let subsystem = Subsystem { view, admin_label: new.admin_label, sock_impls: BTreeMap::new() };
        self.subsystems.insert(new.nqn, subsystem);
        self.edited();
        Ok(())
    }

    fn checked_subsystem(&self, new: &NewSubsystem) -> Result<SubsystemView, ModelError> {
        let serial_number = new.serial_number.clone().unwrap_or_else(|| derived_serial(&new.nqn));
        check_ascii("serial_number", &serial_number, MAX_SERIAL_BYTES)?;
        let model_number = new.model_number.clone().unwrap_or_else(|| DEFAULT_MODEL_NUMBER.to_owned());
        check_ascii("model_number", &model_number, MAX_MODEL_BYTES)?;
        let max_namespaces = new.max_namespaces.filter(|&max| max != 0).unwrap_or(DEFAULT_MAX_NAMESPACES);
        if max_namespaces > MAX_NAMESPACES {
            let (reason, fix) = ("more than a subsystem can have", format!("give 1 to {MAX_NAMESPACES}"));
            return Err(ModelError::invalid("max_namespaces", max_namespaces, reason, fix));
        }
        let (min_cntlid, max_cntlid) = (new.min_cntlid.unwrap_or(1), new.max_cntlid.unwrap_or(MAX_CNTLID));
        for (field, cntlid) in [("min_cntlid", min_cntlid), ("max_cntlid", max_cntlid)] {
            if !(1..=MAX_CNTLID).contains(&cntlid) {
                let reason = "0 and the identifiers from 65520 up are reserved";
                return Err(ModelError::invalid(field, cntlid, reason, format!("give 1 to {MAX_CNTLID}")));
            }
        }
        if min_cntlid > max_cntlid {
            let reason = format!("larger than max_cntlid ({max_cntlid})");
            return Err(ModelError::invalid("min_cntlid", min_cntlid, reason, "give at most max_cntlid"));
        }
        let label = new.admin_label.as_deref().unwrap_or_default();
        if label.len() > 255 || label.chars().any(char::is_control) {
            let reason = "longer than 255 bytes, or with control characters";
            return Err(ModelError::invalid("admin_label", label, reason, "give a short text"));
        }
        Ok(SubsystemView {
            incarnation: 0,
            nqn: new.nqn.clone(),
            serial_number,
            model_number,
            max_namespaces,
            min_cntlid,
            max_cntlid,
            allow_any_host: new.allow_any_host,
            hosts: Vec::new(),
            ana_reporting: new.ana_reporting,
            dmrsl: new.dmrsl.unwrap_or(DEFAULT_DMRSL).into(),
            wzsl: new.wzsl.unwrap_or(DEFAULT_WZSL),
            namespaces: BTreeMap::new(),
            listeners: Vec::new(),
        })
    }

    /// Removes a subsystem with all that belongs to it, and names the namespaces it had.
    ///
    /// # Errors
    /// When there is none with this NQN.
    pub fn delete_subsystem(&mut self, nqn: &str) -> Result<Vec<Incarnation>, ModelError> {
        if is_discovery(nqn) {
            let reason = "the discovery subsystem is always there";
            return Err(ModelError::invalid("nqn", nqn, reason, "name an NVM subsystem"));
        }
        let gone = self.subsystem(nqn)?.view.namespaces.values().map(|namespace| namespace.incarnation).collect();
        self.subsystems.remove(nqn);
        self.edited();
        Ok(gone)
    }

    // Namespaces.

    /// Adds a namespace made of `bdev` under an identity from [`Model::draw_incarnation`], and answers its NSID.
    ///
    /// # Errors
    /// When an identifier is taken or out of range.
    pub fn add_namespace(
        &mut self,
        nqn: &str,
        new: &NewNamespace,
        incarnation: Incarnation,
        bdev: &Arc<BdevInfo>,
        geometry: Geometry,
    ) -> Result<u32, ModelError> {
        assert!(incarnation <= self.last_incarnation, "incarnations are drawn before they are used");
        let subsystem = self.subsystem(nqn)?;
        let nsid = free_nsid(&subsystem.view, new.nsid.unwrap_or(0))?;
        let anagrpid = new.anagrpid.filter(|&group| group != 0).unwrap_or(nsid);
        subsystem.group("namespace.anagrpid", anagrpid)?;
        let uuid = new.uuid.unwrap_or_else(|| bdev.uuid());
        let namespace = NamespaceView {
            incarnation,
            nsid,
            bdev: Arc::clone(bdev),
            geometry,
            uuid,
            nguid: Some(new.nguid.unwrap_or(*uuid.as_bytes())),
            eui64: new.eui64,
            anagrpid,
        };
        unique(&subsystem.view, &namespace)?;
        self.subsystem_mut(nqn)?.edit().namespaces.insert(nsid, Arc::new(namespace));
        self.edited();
        Ok(nsid)
    }

    /// Removes a namespace and answers which it was.
    ///
    /// # Errors
    /// When there is none.
    pub fn remove_namespace(&mut self, nqn: &str, nsid: u32) -> Result<Incarnation, ModelError> {
        let incarnation = self.namespace(nqn, nsid)?.incarnation;
        self.subsystem_mut(nqn)?.edit().namespaces.remove(&nsid);
        self.edited();
        Ok(incarnation)
    }

    fn namespace(&self, nqn: &str, nsid: u32) -> Result<&NamespaceView, ModelError> {
        let view = &self.subsystem(nqn)?.view;
        view.namespaces.get(&nsid).map(|namespace| &**namespace).ok_or_else(|| {
            let have: Vec<String> = view.namespaces.keys().take(16).map(u32::to_string).collect();
            let fix = match have.is_empty() {
                true => "it has none".to_owned(),
                false => format!("it has {}", have.join(", ")),
            };
            ModelError::not_found("nsid", nsid, format!("{nqn} has no such namespace"), fix)
        })
    }

    /// Where the namespace of this identity is.
    pub fn find(&self, incarnation: Incarnation) -> Option<(&str, u32)> {
        self.subsystems.values().find_map(|subsystem| {
            let found = subsystem.view.namespaces.values().find(|namespace| namespace.incarnation == incarnation)?;
            Some((&*subsystem.view.nqn, found.nsid))
        })
    }

    /// The namespace's device has another geometry now. Tells whether that changed anything.
    pub fn resize_namespace(&mut self, incarnation: Incarnation, geometry: Geometry) -> bool {
        let Some((nqn, nsid)) = self.find(incarnation).map(|(nqn, nsid)| (nqn.to_owned(), nsid)) else { return false };
        let subsystem = self.subsystems.get_mut(&nqn).expect("just found");
        if subsystem.view.namespaces[&nsid].geometry == geometry {
            return false;
        }
        let namespace = subsystem.edit().namespaces.get_mut(&nsid).expect("just found");
        Arc::make_mut(namespace).geometry = geometry;
        self.edited();
        true
    }

    /// Moves a namespace to another ANA group.
    ///
    /// # Errors
    /// When there is no such namespace or group, or the subsystem does not report ANA.
    pub fn set_ana_group(&mut self, nqn: &str, nsid: u32, group: u32) -> Result<(), ModelError> {
        self.namespace(nqn, nsid)?;
        let subsystem = self.subsystem_mut(nqn)?;
        subsystem.ana_reporting("anagrpid", json!(group))?;
        subsystem.group("anagrpid", group)?;
        let namespace = subsystem.edit().namespaces.get_mut(&nsid).expect("just seen");
        Arc::make_mut(namespace).anagrpid = group;
        self.edited();
        Ok(())
    }

    // Hosts.

    /// Lets a host connect.
    ///
    /// # Errors
    /// When it may already, or its NQN is none.
    pub fn add_host(&mut self, nqn: &str, host: &str) -> Result<(), ModelError> {
        let subsystem = self.subsystem_mut(nqn)?;
        check_nqn("host", host)?;
        if subsystem.view.hosts.iter().any(|known| known == host) {
            let reason = format!("{nqn} lists this host already");
            return Err(ModelError::exists("host", host, reason, "nothing has to be done"));
        }
        if subsystem.view.hosts.len() >= MAX_HOSTS {
            let reason = format!("{nqn} lists {MAX_HOSTS} hosts, and no more are possible");
            return Err(ModelError::full("host", host, reason, "remove one, or allow any host"));
        }
        subsystem.edit().hosts.push(host.to_owned());
        self.edited();
        Ok(())
    }

    /// No longer lets a host connect.
    ///
    /// # Errors
    /// When it is not listed.
    pub fn remove_host(&mut self, nqn: &str, host: &str) -> Result<(), ModelError> {
        let subsystem = self.subsystem_mut(nqn)?;
        let Some(at) = subsystem.view.hosts.iter().position(|known| known == host) else {
            let fix = match schema::nearest(host, subsystem.view.hosts.iter().map(String::as_str)) {
                Some(near) => format!("did you mean {near}?"),
                None => "nvmf_get_subsystems shows those that it lists".into(),
            };
            return Err(ModelError::not_found("host", host, format!("{nqn} does not list this host"), fix));
        };
        subsystem.edit().hosts.remove(at);
        self.edited();
        Ok(())
    }

    /// Lets any host connect, or only those that are listed.
    ///
    /// # Errors
    /// When there is no such subsystem.
    pub fn allow_any_host(&mut self, nqn: &str, allow: bool) -> Result<(), ModelError> {
        self.subsystem_mut(nqn)?.edit().allow_any_host = allow;
        self.edited();
        Ok(())
    }

    // Listeners.

    /// Every address that has to be open.
    pub fn addresses(&self) -> BTreeSet<ListenAddress> {
        let listeners = self.subsystems.values().flat_map(|subsystem| &subsystem.view.listeners);
        listeners.map(|listener| listener.address.clone()).chain(self.discovery.iter().cloned()).collect()
    }

    /// Whether `address` has to be open.
    pub fn is_listening(&self, address: &ListenAddress) -> bool {
        self.discovery.contains(address)
            || self.subsystems.values().any(|subsystem| subsystem.view.listener(address).is_some())
    }

    /// Whether [`Model::add_listener`] would accept this.
    ///
    /// # Errors
    /// When there is no such subsystem or transport, or it listens there already.
    pub fn check_listener(&self, nqn: &str, new: &NewListener) -> Result<(), ModelError> {
        let address = &new.address;
        let listens = match is_discovery(nqn) {
            true => self.discovery.contains(address),
            false => self.subsystem(nqn)?.view.listener(address).is_some(),
        };
        let shown = address.socket_addr().to_string();
        if !self.transports.contains_key(&address.trtype) {
            let name = address.trtype.name();
            let fix = format!("call nvmf_create_transport with trtype {name} first");
            let reason = format!("there is no transport {name} yet");
            return Err(ModelError::not_found("listen_address.trtype", name, reason, fix));
        }
        check_port("listen_address.trsvcid", address)?;
        if listens {
            let reason = "the subsystem listens there already";
            return Err(ModelError::exists("listen_address", shown, reason, "nothing has to be done"));
        }
        if !self.is_listening(address) && self.addresses().len() >= MAX_ADDRESSES {
            let reason = format!("the target listens on {MAX_ADDRESSES} addresses, and no more are possible");
            return Err(ModelError::full("listen_address", shown, reason, "remove one"));
        }
        match new.ana_state {
            None | Some(AnaState::Optimized) => Ok(()),
            Some(state) if is_discovery(nqn) => {
                let reason = "the discovery subsystem has no namespaces";
                Err(ModelError::invalid("ana_state", state.name(), reason, "leave it out"))
            }
            Some(state) => self.subsystem(nqn)?.ana_reporting("ana_state", json!(state.name())),
        }
    }

    /// Makes a subsystem reachable at an address.
    ///
    /// # Errors
    /// As [`Model::check_listener`].
    pub fn add_listener(&mut self, nqn: &str, new: NewListener) -> Result<(), ModelError> {
        self.check_listener(nqn, &new)?;
        let NewListener { address, ana_state, sock_impl } = new;
        if is_discovery(nqn) {
            self.discovery_sock_impls.extend(sock_impl.map(|name| (address.clone(), name)));
            self.discovery.push(address);
        } else {
            let port_id = self.port_id(&address);
            let subsystem = self.subsystem_mut(nqn)?;
            let groups = 1..=subsystem.view.max_namespaces;
            let ana_states = match ana_state {
                None | Some(AnaState::Optimized) => BTreeMap::new(),
                Some(state) => groups.map(|group| (group, state)).collect(),
            };
            subsystem.sock_impls.extend(sock_impl.map(|name| (address.clone(), name)));
            let listener = ListenerView { address, port_id, ana_states };
            subsystem.edit().listeners.push(Arc::new(listener));
        }
        self.edited();
        Ok(())
    }

    /// The port identifier of an address: the same for all subsystems that listen there.
    fn port_id(&mut self, address: &ListenAddress) -> u16 {
        if let Some(&id) = self.port_ids.get(address) {
            return id;
        }
        let taken: BTreeSet<u16> = self.port_ids.values().copied().collect();
        let id = (0..=u16::MAX).find(|id| !taken.contains(id)).expect("there are fewer addresses than identifiers");
        self.port_ids.insert(address.clone(), id);
        id
    }

    /// Makes a subsystem unreachable at an address.
    ///
    /// # Errors
    /// When it does not listen there.
    pub fn remove_listener(&mut self, nqn: &str, address: &ListenAddress) -> Result<(), ModelError> {
        if is_discovery(nqn) {
            let at = self.discovery.iter().position(|known| known == address);
            let at = at.ok_or_else(|| no_listener(nqn, address, &self.discovery))?;
            self.discovery.remove(at);
            self.discovery_sock_impls.remove(address);
        } else {
            let at = self.listener(nqn, address)?;
            let subsystem = self.subsystem_mut(nqn)?;
            subsystem.edit().listeners.remove(at);
            subsystem.sock_impls.remove(address);
        }
        self.edited();
        Ok(())
    }

    fn listener(&self, nqn: &str, address: &ListenAddress) -> Result<usize, ModelError> {
        let listeners = &self.subsystem(nqn)?.view.listeners;
        listeners.iter().position(|listener| listener.address == *address).ok_or_else(|| {
            let have: Vec<_> = listeners.iter().map(|listener| listener.address.clone()).collect();
            no_listener(nqn, address, &have)
        })
    }

    /// Sets the state of one ANA group, or of all, as seen through one listener.
    ///
    /// # Errors
    /// When there is no such listener or group, or the subsystem does not report ANA.
    pub fn set_ana_state(
        &mut self,
        nqn: &str,
        address: &ListenAddress,
        state: AnaState,
        group: Option<u32>,
    ) -> Result<(), ModelError> {
        let at = self.listener(nqn, address)?;
        let subsystem = self.subsystem_mut(nqn)?;
        subsystem.ana_reporting("ana_state", json!(state.name()))?;
        let groups = match group.filter(|&group| group != 0) {
            None => 1..=subsystem.view.max_namespaces,
            Some(group) => {
                subsystem.group("anagrpid", group)?;
                group..=group
            }
        };
        let listener = Arc::make_mut(&mut subsystem.edit().listeners[at]);
        for group in groups {
            match state {
                AnaState::Optimized => listener.ana_states.remove(&group),
                state => listener.ana_states.insert(group, state),
            };
        }
        self.edited();
        Ok(())
    }

    // Referrals.

    /// Refers hosts to another discovery service. The same referral again changes nothing.
    ///
    /// # Errors
    /// When a field makes no sense.
    pub fn add_referral(&mut self, referral: Referral) -> Result<(), ModelError> {
        check_port("address.trsvcid", &referral.address)?;
        check_referral(&referral)?;
        let shown = referral.address.socket_addr().to_string();
        match self.referrals.iter().find(|known| known.address == referral.address && known.subnqn == referral.subnqn) {
            Some(known) if *known == referral => return Ok(()),
            Some(known) => {
                let reason = format!("it is there with secure_channel = {}", known.secure_channel);
                return Err(ModelError::exists("address", shown, reason, "remove it first"));
            }
            None => {}
        }
        if self.referrals.len() >= MAX_REFERRALS {
            let reason = format!("there are {MAX_REFERRALS} referrals, and no more are possible");
            return Err(ModelError::full("address", shown, reason, "remove one"));
        }
        self.referrals.push(referral);
        self.edited();
        Ok(())
    }

    /// No longer refers hosts to a discovery service.
    ///
    /// # Errors
    /// When there is no such referral.
    pub fn remove_referral(&mut self, address: &ListenAddress, subnqn: &str) -> Result<(), ModelError> {
        let at = self.referrals.iter().position(|known| known.address == *address && known.subnqn == subnqn);
        let Some(at) = at else {
            let (shown, reason) =
                (address.socket_addr().to_string(), format!("there is no referral to {subnqn} there"));
            return Err(ModelError::not_found("address", shown, reason, "nvmf_discovery_get_referrals lists them"));
        };
        self.referrals.remove(at);
        self.edited();
        Ok(())
    }
}

#[cfg(test)]
mod tests;
