BEGIN TRANSACTION;
CREATE TABLE adapters (
	id INTEGER NOT NULL, 
	line TEXT NOT NULL, 
	version INTEGER NOT NULL, 
	origin TEXT NOT NULL, 
	task TEXT, 
	task_revision INTEGER, 
	mask_task TEXT, 
	mask_version INTEGER, 
	method TEXT NOT NULL, 
	rank INTEGER NOT NULL, 
	projection TEXT, 
	base TEXT NOT NULL, 
	sequence BOOLEAN NOT NULL, 
	run TEXT, 
	stage INTEGER, 
	digest TEXT NOT NULL, 
	bytes BIGINT NOT NULL, 
	created_at TEXT NOT NULL, 
	config TEXT NOT NULL, 
	versions TEXT NOT NULL, 
	facts TEXT NOT NULL, 
	CONSTRAINT pk_adapters PRIMARY KEY (id), 
	CONSTRAINT fk_adapters_line FOREIGN KEY(line) REFERENCES lines (name), 
	CONSTRAINT fk_adapters_base FOREIGN KEY(base) REFERENCES base (fingerprint), 
	CONSTRAINT fk_adapters_run FOREIGN KEY(run) REFERENCES runs (id), 
	CONSTRAINT fk_adapters_task_task_revision FOREIGN KEY(task, task_revision) REFERENCES tasks (name, revision), 
	CONSTRAINT fk_adapters_mask_task_mask_version FOREIGN KEY(mask_task, mask_version) REFERENCES masks (task, version), 
	CONSTRAINT uq_adapters_line_version UNIQUE (line, version), 
	CONSTRAINT uq_adapters_run_stage UNIQUE (run, stage)
);
INSERT INTO "adapters" VALUES(1,'safety',1,'trained','safety',1,'safety',1,'lori-s',8,'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa','ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff',0,'00acb2c158ad400f92c83c207cfa840b',0,'a7937b64b8caa58f03721bb6bacf5c78cb235febe0e70b1b84cd99541461a08e',5,'2026-11-22T21:14:58.334558+00:00','{"seed":1,"targets":["q_proj"]}','{"torch":"2.13.0"}','{"loss":0.25}');
INSERT INTO "adapters" VALUES(2,'safety',2,'trained',NULL,NULL,NULL,NULL,'lori-s',8,'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa','ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff',0,NULL,NULL,'16367aacb67a4a017c8da8ab95682ccb390863780f7114dda0a0e0c55644c7c4',6,'2026-11-22T21:14:58.443281+00:00','{"seed":1,"targets":["q_proj"]}','{"torch":"2.13.0"}','{"loss":0.5}');
INSERT INTO "adapters" VALUES(3,'main',1,'merged',NULL,NULL,NULL,NULL,'concat',8,NULL,'ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff',0,NULL,NULL,'283128acef14943c127f7327ca8f57e7cd7c31ec6c5546de5d62ab16a2f9758a',5,'2026-11-22T21:14:58.531719+00:00','{"seed":1,"targets":["q_proj"]}','{"torch":"2.13.0"}','{"loss":0.25}');
INSERT INTO "adapters" VALUES(4,'main',2,'trained',NULL,NULL,NULL,NULL,'lori-s',8,'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa','ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff',0,NULL,NULL,'a7937b64b8caa58f03721bb6bacf5c78cb235febe0e70b1b84cd99541461a08e',5,'2026-11-22T21:14:58.585225+00:00','{"seed":1,"targets":["q_proj"]}','{"torch":"2.13.0"}','{"loss":0.25}');
INSERT INTO "adapters" VALUES(5,'safety',3,'trained',NULL,NULL,NULL,NULL,'lori-s',8,'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa','ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff',0,NULL,NULL,'7c7bfe826b20f5e2dd3328afe12f02c6f6585af99bdf716fb617b5c06515fee7',13,'2026-11-22T21:14:59.122852+00:00','{"seed":1,"targets":["q_proj"]}','{"torch":"2.13.0"}','{"loss":0.25}');
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('0008');
CREATE TABLE aliases (
	line TEXT NOT NULL, 
	name TEXT NOT NULL, 
	version INTEGER NOT NULL, 
	moved_at TEXT NOT NULL, 
	CONSTRAINT pk_aliases PRIMARY KEY (line, name), 
	CONSTRAINT fk_aliases_line_version FOREIGN KEY(line, version) REFERENCES adapters (line, version)
);
INSERT INTO "aliases" VALUES('main','production',2,'2026-11-22T21:14:58.865055+00:00');
CREATE TABLE answers (
	id INTEGER NOT NULL, 
	digest TEXT NOT NULL, 
	task TEXT NOT NULL, 
	task_revision INTEGER NOT NULL, 
	scorer TEXT NOT NULL, 
	scorer_version TEXT NOT NULL, 
	precision TEXT NOT NULL, 
	encoding TEXT NOT NULL, 
	"row" BIGINT NOT NULL, 
	answer BLOB NOT NULL, 
	CONSTRAINT pk_answers PRIMARY KEY (id), 
	CONSTRAINT fk_answers_task FOREIGN KEY(task, task_revision) REFERENCES tasks (name, revision), 
	CONSTRAINT uq_answers_key UNIQUE (digest, task, task_revision, scorer, scorer_version, precision, encoding, "row")
);
INSERT INTO "answers" VALUES(1,'a7937b64b8caa58f03721bb6bacf5c78cb235febe0e70b1b84cd99541461a08e','wiki',1,'exact_match','1','fp32','e',0,X'789CCB4A0400013700CC');
INSERT INTO "answers" VALUES(2,'a7937b64b8caa58f03721bb6bacf5c78cb235febe0e70b1b84cd99541461a08e','wiki',1,'exact_match','1','fp32','e',3,X'789CCB3BBC1200037C01DB');
CREATE TABLE base (
	id INTEGER NOT NULL, 
	fingerprint TEXT NOT NULL, 
	source TEXT NOT NULL, 
	revision TEXT, 
	path TEXT NOT NULL, 
	model_type TEXT NOT NULL, 
	created_at TEXT NOT NULL, code TEXT, 
	CONSTRAINT pk_base PRIMARY KEY (id), 
	CONSTRAINT ck_base_one_row CHECK (id = 1), 
	CONSTRAINT uq_base_fingerprint UNIQUE (fingerprint)
);
INSERT INTO "base" VALUES(1,'ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff','hub/tiny','abc','/models/tiny','llama','2026-01-02T03:04:05.678901+00:00',NULL);
CREATE TABLE forecasts (
	id INTEGER NOT NULL, 
	merge TEXT NOT NULL, 
	precision TEXT NOT NULL, 
	member TEXT NOT NULL, 
	task TEXT NOT NULL, 
	task_revision INTEGER NOT NULL, 
	scorer TEXT NOT NULL, 
	scorer_version TEXT NOT NULL, 
	encoding TEXT NOT NULL, 
	agrees FLOAT NOT NULL, 
	rows INTEGER NOT NULL, 
	own FLOAT, 
	score FLOAT, 
	error FLOAT, 
	created_at TEXT NOT NULL, 
	CONSTRAINT pk_forecasts PRIMARY KEY (id), 
	CONSTRAINT fk_forecasts_task_task_revision FOREIGN KEY(task, task_revision) REFERENCES tasks (name, revision)
);
INSERT INTO "forecasts" VALUES(1,'mmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmmm','fp32','safety@1','safety',1,'exact_match','1','e',0.9,40,0.7,0.63,0.05,'2026-11-22T21:14:59.022876+00:00');
CREATE TABLE home (
	id INTEGER NOT NULL, 
	folder TEXT NOT NULL, 
	place TEXT NOT NULL, 
	CONSTRAINT pk_home PRIMARY KEY (id), 
	CONSTRAINT ck_home_one_row CHECK (id = 1)
);
CREATE TABLE journal (
	id INTEGER NOT NULL, 
	at TEXT NOT NULL, 
	user TEXT NOT NULL, 
	action TEXT NOT NULL, 
	line TEXT NOT NULL, 
	name TEXT NOT NULL, 
	from_version INTEGER, 
	to_version INTEGER, 
	forced BOOLEAN NOT NULL, 
	reason TEXT NOT NULL, 
	verdict TEXT NOT NULL, 
	CONSTRAINT pk_journal PRIMARY KEY (id), 
	CONSTRAINT fk_journal_line FOREIGN KEY(line) REFERENCES lines (name)
);
INSERT INTO "journal" VALUES(1,'2026-11-22T21:14:58.849324+00:00','root','set','main','production',NULL,1,0,'','null');
INSERT INTO "journal" VALUES(2,'2026-11-22T21:14:58.865055+00:00','root','set','main','production',1,2,0,'better','null');
INSERT INTO "journal" VALUES(3,'2026-11-22T21:14:58.888281+00:00','root','set','safety','champion',NULL,2,0,'','null');
INSERT INTO "journal" VALUES(4,'2026-11-22T21:14:58.927691+00:00','root','removed','safety','champion',2,NULL,0,'','null');
CREATE TABLE kind_comparisons (
	id INTEGER NOT NULL, 
	digest TEXT NOT NULL, 
	task TEXT NOT NULL, 
	task_revision INTEGER NOT NULL, 
	"plan" TEXT NOT NULL, 
	created_at TEXT NOT NULL, 
	CONSTRAINT pk_kind_comparisons PRIMARY KEY (id), 
	CONSTRAINT fk_kind_comparisons_task_task_revision FOREIGN KEY(task, task_revision) REFERENCES tasks (name, revision), 
	CONSTRAINT uq_kind_comparisons_digest UNIQUE (digest)
);
INSERT INTO "kind_comparisons" VALUES(1,'ad41fe81a2ba0a3a2f0b959ab57e5450efb43df8095e2a6749f63d1134f55532','safety',1,'{"search":{"points":1},"steps":4}','2026-11-22T21:14:59.049243+00:00');
CREATE TABLE kind_steps (
	id INTEGER NOT NULL, 
	comparison INTEGER NOT NULL, 
	entry TEXT NOT NULL, 
	step TEXT NOT NULL, 
	point TEXT NOT NULL, 
	line TEXT, 
	version INTEGER, 
	facts TEXT NOT NULL, 
	created_at TEXT NOT NULL, 
	CONSTRAINT pk_kind_steps PRIMARY KEY (id), 
	CONSTRAINT fk_kind_steps_comparison FOREIGN KEY(comparison) REFERENCES kind_comparisons (id), 
	CONSTRAINT fk_kind_steps_line_version FOREIGN KEY(line, version) REFERENCES adapters (line, version), 
	CONSTRAINT uq_kind_steps_key UNIQUE (comparison, entry, step, point)
);
INSERT INTO "kind_steps" VALUES(1,1,'dora','search','0.001',NULL,NULL,'{"loss":0.5}','2026-11-22T21:14:59.064211+00:00');
INSERT INTO "kind_steps" VALUES(2,1,'dora','train','0','safety',1,'{"rate":0.001}','2026-11-22T21:14:59.087295+00:00');
CREATE TABLE lines (
	id INTEGER NOT NULL, 
	name TEXT NOT NULL, 
	of_task BOOLEAN NOT NULL, 
	sequence TEXT NOT NULL, 
	created_at TEXT NOT NULL, 
	CONSTRAINT pk_lines PRIMARY KEY (id), 
	CONSTRAINT uq_lines_name UNIQUE (name)
);
INSERT INTO "lines" VALUES(1,'safety',1,'[]','2026-11-22T21:14:57.939824+00:00');
INSERT INTO "lines" VALUES(2,'wiki',1,'[]','2026-11-22T21:14:58.163033+00:00');
INSERT INTO "lines" VALUES(3,'main',0,'[]','2026-11-22T21:14:58.530831+00:00');
INSERT INTO "lines" VALUES(4,'stages',0,'["safety#1","wiki#1"]','2026-11-22T21:14:58.614498+00:00');
CREATE TABLE masks (
	id INTEGER NOT NULL, 
	task TEXT NOT NULL, 
	task_revision INTEGER NOT NULL, 
	version INTEGER NOT NULL, 
	digest TEXT NOT NULL, 
	projection TEXT NOT NULL, 
	sparsity FLOAT NOT NULL, 
	scope TEXT NOT NULL, 
	kept BIGINT NOT NULL, 
	total BIGINT NOT NULL, 
	config TEXT NOT NULL, 
	created_at TEXT NOT NULL, 
	CONSTRAINT pk_masks PRIMARY KEY (id), 
	CONSTRAINT fk_masks_task_task_revision FOREIGN KEY(task, task_revision) REFERENCES tasks (name, revision), 
	CONSTRAINT uq_masks_task_version UNIQUE (task, version)
);
INSERT INTO "masks" VALUES(1,'safety',1,1,'48bf9b4f142ab45cac6f33cf99415bca6ca8e07608a031237aa76560fec2204b','aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa',0.9,'model',1,10,'{"seed":1}','2026-11-22T21:14:58.244056+00:00');
CREATE TABLE parents (
	adapter INTEGER NOT NULL, 
	position INTEGER NOT NULL, 
	line TEXT NOT NULL, 
	version INTEGER NOT NULL, 
	digest TEXT NOT NULL, 
	weight FLOAT, 
	CONSTRAINT pk_parents PRIMARY KEY (adapter, position), 
	CONSTRAINT fk_parents_adapter FOREIGN KEY(adapter) REFERENCES adapters (id), 
	CONSTRAINT fk_parents_line_version FOREIGN KEY(line, version) REFERENCES adapters (line, version)
);
INSERT INTO "parents" VALUES(2,0,'safety',1,'a7937b64b8caa58f03721bb6bacf5c78cb235febe0e70b1b84cd99541461a08e',NULL);
INSERT INTO "parents" VALUES(3,0,'safety',1,'a7937b64b8caa58f03721bb6bacf5c78cb235febe0e70b1b84cd99541461a08e',0.25);
INSERT INTO "parents" VALUES(3,1,'safety',2,'16367aacb67a4a017c8da8ab95682ccb390863780f7114dda0a0e0c55644c7c4',0.75);
CREATE TABLE removals (
	id INTEGER NOT NULL, 
	at TEXT NOT NULL, 
	user TEXT NOT NULL, 
	line TEXT NOT NULL, 
	version INTEGER NOT NULL, 
	hidden BOOLEAN NOT NULL, 
	reason TEXT NOT NULL, 
	CONSTRAINT pk_removals PRIMARY KEY (id), 
	CONSTRAINT fk_removals_line_version FOREIGN KEY(line, version) REFERENCES adapters (line, version)
);
INSERT INTO "removals" VALUES(1,'2026-11-22T21:14:59.185871+00:00','root','safety',3,1,'a mistake');
CREATE TABLE row_weights (
	id INTEGER NOT NULL, 
	digest TEXT NOT NULL, 
	content BLOB NOT NULL, 
	CONSTRAINT pk_row_weights PRIMARY KEY (id), 
	CONSTRAINT uq_row_weights_digest UNIQUE (digest)
);
INSERT INTO "row_weights" VALUES(1,'e3ea7ef003c1d3f881e01528b0d60f94ca7fa1d993931b2485748e0be71d2e2a',X'0678DA636040070D2054F0604183BD8323103838380200380205B57948D48A');
INSERT INTO "row_weights" VALUES(2,'54701ac5f5a7dcfa0e8579e7b6d9bcc05d33a3ab0912df2a3e6dd1d71c20a257',X'0678DA636040071D0E13661C1030081070747004214747003CDC059824E0A4AB');
INSERT INTO "row_weights" VALUES(3,'a1270f6b5758e082fbe4b5c7bc62644503db957125766fb00d009c9c87ce0ef8',X'0678DA63604007050E0D1D0C0C0A0C028E0EF68E8E0E8E8E8E0029AF042E3F3F3FA1');
CREATE TABLE runs (
	id TEXT NOT NULL, 
	"plan" TEXT NOT NULL, 
	open_plan TEXT, 
	created_at TEXT NOT NULL, 
	CONSTRAINT pk_runs PRIMARY KEY (id), 
	CONSTRAINT uq_runs_open_plan UNIQUE (open_plan)
);
INSERT INTO "runs" VALUES('00acb2c158ad400f92c83c207cfa840b','{"options":{"start":null},"tasks":["safety#1"]}','ab565bb77abf4881b79a92e17479105e607d8b2f02b372edd294ee82cc6523ae','2026-11-22T21:14:58.291944+00:00');
INSERT INTO "runs" VALUES('91ba10b983c445568b9d3281e1e1678a','{"options":{"start":"safety@1"},"tasks":["wiki#1"]}','2d8c1a440cc88e738d180393e8828e1dd3841c589e5c85929c2d2d1752bbf237','2026-11-22T21:14:58.366812+00:00');
CREATE TABLE "score_facts" (
	id INTEGER NOT NULL, 
	facts TEXT NOT NULL, 
	digest TEXT NOT NULL, 
	CONSTRAINT pk_score_facts PRIMARY KEY (id), 
	CONSTRAINT uq_score_facts_digest UNIQUE (digest)
);
INSERT INTO "score_facts" VALUES(1,'{"seconds":1.5}','4d5fcac9c47ce07acf78133476884c162be41ff2d3fff9740be2b7dd83fcb10b');
CREATE TABLE score_pages (
	id INTEGER NOT NULL, 
	setting INTEGER NOT NULL, 
	number INTEGER NOT NULL, 
	directory BLOB NOT NULL, 
	reference BLOB, 
	bodies BLOB NOT NULL, 
	CONSTRAINT pk_score_pages PRIMARY KEY (id), 
	CONSTRAINT fk_score_pages_setting FOREIGN KEY(setting) REFERENCES settings (id), 
	CONSTRAINT uq_score_pages_setting_number UNIQUE (setting, number)
);
INSERT INTO "score_pages" VALUES(1,1,0,X'0104000400000000000000E03F9A9999999999B93F1E000000000000000000E03F9A9999999999B93F1E000000000000000000E03F9A9999999999B93F1E000000000000000000E03F9A9999999999B93F1E0000008001B4B3D183FFB8B006040100018101F69606010100048201B4A205010100048301DCA40702010001731CA6C6',X'01F2957FCC38918016',X'008DEF02D2F7FDD72CBA2E487B5AAEEFB82D944E4A008DEF02D2');
INSERT INTO "score_pages" VALUES(2,2,0,X'0103000300000000000000E03F9A9999999999B93F09000000000000000000E03F9A9999999999B93F09000000000000000000E03F9A9999999999B93F090000008001CEC9D583FFB8B006150100248101B8AB04250100248201C8BB053501002453D5E049',NULL,X'F36A2C3FB616BC3FB9CEFA3FA201753F29703940FC2A033F4E7E8240FB0A024077168B40B36EBA4580BF793F021B1E3F1CB12740095D7D4074F89D40D2D4623FB19958409577823F77BDDD3E227ECC51CF0AD33FE8C4864086420940695F0C40514B0740D00F613E3959543FB815A93FF8F74A3FA2EC9864');
CREATE TABLE settings (
	id INTEGER NOT NULL, 
	task TEXT NOT NULL, 
	task_revision INTEGER NOT NULL, 
	scorer TEXT NOT NULL, 
	scorer_version TEXT NOT NULL, 
	precision TEXT NOT NULL, 
	encoding TEXT NOT NULL, 
	origin TEXT NOT NULL, 
	CONSTRAINT pk_settings PRIMARY KEY (id), 
	CONSTRAINT fk_settings_task_task_revision FOREIGN KEY(task, task_revision) REFERENCES tasks (name, revision), 
	CONSTRAINT uq_settings_key UNIQUE (task, task_revision, scorer, scorer_version, precision, encoding, origin)
);
INSERT INTO "settings" VALUES(1,'safety',1,'exact_match','1','fp32','','measured');
INSERT INTO "settings" VALUES(2,'wiki',1,'perplexity','1','fp32','','measured');
CREATE TABLE splits (
	id INTEGER NOT NULL, 
	task TEXT NOT NULL, 
	task_revision INTEGER NOT NULL, 
	name TEXT NOT NULL, 
	digest TEXT NOT NULL, 
	rows BIGINT NOT NULL, 
	tokens BIGINT NOT NULL, 
	longest BIGINT NOT NULL, 
	truncated BIGINT NOT NULL, 
	CONSTRAINT pk_splits PRIMARY KEY (id), 
	CONSTRAINT fk_splits_task_task_revision FOREIGN KEY(task, task_revision) REFERENCES tasks (name, revision), 
	CONSTRAINT uq_splits_task_task_revision_name UNIQUE (task, task_revision, name)
);
INSERT INTO "splits" VALUES(1,'safety',1,'train','9a6c295d70e13831224a0aa1fbf248a5b8ceab55d5e3030a47277292b596d11b',100,700,40,1);
INSERT INTO "splits" VALUES(2,'safety',1,'eval','2e36d24f868db2c924fb89686dfb003de701660a9fef98a74ea6b8d8748758c8',30,210,40,1);
INSERT INTO "splits" VALUES(3,'safety',2,'train','8ddfb291ad583188e9c828108821a96cdbac40bfa510f79d463ab1d06a40e070',100,700,40,1);
INSERT INTO "splits" VALUES(4,'safety',2,'eval','cde7e587f5f0364bc8222958b96106d340c1a312520a1fefcf8e54d2b5e737f3',40,280,40,1);
INSERT INTO "splits" VALUES(5,'wiki',1,'train','2a186fa1a414960ea66645ba9b49b0fc637fe3e437876bda2e00dc7c230ca13c',100,700,40,1);
INSERT INTO "splits" VALUES(6,'wiki',1,'eval','4da3ced4afa83bc833f8132c4df42eb93e810872ccf6889595ab541aaa4b6f71',9,63,40,1);
CREATE TABLE subjects (
	id INTEGER NOT NULL, 
	digest TEXT NOT NULL, 
	CONSTRAINT pk_subjects PRIMARY KEY (id), 
	CONSTRAINT uq_subjects_digest UNIQUE (digest)
);
INSERT INTO "subjects" VALUES(128,'a7937b64b8caa58f03721bb6bacf5c78cb235febe0e70b1b84cd99541461a08e');
INSERT INTO "subjects" VALUES(129,'16367aacb67a4a017c8da8ab95682ccb390863780f7114dda0a0e0c55644c7c4');
INSERT INTO "subjects" VALUES(130,'283128acef14943c127f7327ca8f57e7cd7c31ec6c5546de5d62ab16a2f9758a');
INSERT INTO "subjects" VALUES(131,'ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff');
CREATE TABLE "tasks" (
	id INTEGER NOT NULL, 
	name TEXT NOT NULL, 
	revision INTEGER NOT NULL, 
	scorer TEXT NOT NULL, 
	scorer_version TEXT NOT NULL, 
	description TEXT NOT NULL, 
	options TEXT NOT NULL, 
	created_at TEXT NOT NULL, 
	CONSTRAINT pk_tasks PRIMARY KEY (id), 
	CONSTRAINT fk_tasks_name FOREIGN KEY(name) REFERENCES lines (name), 
	CONSTRAINT uq_tasks_name_revision UNIQUE (name, revision)
);
INSERT INTO "tasks" VALUES(1,'safety',1,'exact_match','1','what it is','{"seed":0,"sources":["a.jsonl"]}','2026-11-22T21:14:57.940847+00:00');
INSERT INTO "tasks" VALUES(2,'safety',2,'exact_match','1','what it is','{"seed":0,"sources":["a.jsonl"]}','2026-11-22T21:14:58.060259+00:00');
INSERT INTO "tasks" VALUES(3,'wiki',1,'exact_match','1','what it is','{"seed":0,"sources":["a.jsonl"]}','2026-11-22T21:14:58.163700+00:00');
CREATE TABLE trials (
	id INTEGER NOT NULL, 
	recipe TEXT NOT NULL, 
	digest TEXT NOT NULL, 
	task TEXT NOT NULL, 
	task_revision INTEGER NOT NULL, 
	scorer TEXT NOT NULL, 
	scorer_version TEXT NOT NULL, 
	precision TEXT NOT NULL, 
	created_at TEXT NOT NULL, 
	outcomes BLOB NOT NULL, 
	weights BLOB, 
	CONSTRAINT pk_trials PRIMARY KEY (id), 
	CONSTRAINT fk_trials_task FOREIGN KEY(task, task_revision) REFERENCES tasks (name, revision), 
	CONSTRAINT uq_trials_key UNIQUE (recipe, task, task_revision, scorer, scorer_version, precision)
);
INSERT INTO "trials" VALUES(1,'rrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrr','dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd','wiki',1,'exact_match','1','fp32','2026-11-22T21:14:59.003452+00:00',X'789C63606060B0EC7B6C6BD9976CB77AD52A3B20DBEE89059FFDEA555AF64532EEF640717B00E8D50D19',NULL);
CREATE INDEX ix_adapters_digest ON adapters (digest);
CREATE INDEX ix_parents_line_version ON parents (line, version);
CREATE INDEX ix_journal_line ON journal (line);
CREATE TRIGGER journal_refuses_update BEFORE UPDATE ON journal BEGIN SELECT RAISE(ABORT, 'the journal only grows'); END;
CREATE TRIGGER journal_refuses_delete BEFORE DELETE ON journal BEGIN SELECT RAISE(ABORT, 'the journal only grows'); END;
CREATE INDEX ix_removals_line_version ON removals (line, version);
CREATE TRIGGER removals_refuse_update BEFORE UPDATE ON removals BEGIN SELECT RAISE(ABORT, 'removals only grow'); END;
CREATE TRIGGER removals_refuse_delete BEFORE DELETE ON removals BEGIN SELECT RAISE(ABORT, 'removals only grow'); END;
COMMIT;
