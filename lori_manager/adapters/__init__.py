from lori_manager.quieting import quiet_bitsandbytes

quiet_bitsandbytes()  # modules of this package import peft
